"""Gathered writes into the file behind some memory."""

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int, const iovec *, int, long)

cdef enum:
    MAX_RUN = 512  # pages in one gathered write

cdef int write_all(int fd, iovec *parts, int count, long offset) noexcept nogil
