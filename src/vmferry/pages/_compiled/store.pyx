# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Pages into the file of their RAM block."""

from libc.errno cimport EINTR, EIO, EOPNOTSUPP, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from .page cimport KINDS, MAX_PAGE, PAGE, XBZRLE, ZERO, Row, is_sound
from .sums cimport page_sum
from .xbzrle cimport decode

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int, void *, size_t, long)
    ssize_t pwrite(int, const void *, size_t, long)

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>
    extern int fallocate(int, int, off_t, off_t);
    static int punch(int fd, long offset, long length)
    {
        return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
    }
    """
    int punch(int, long, long) nogil

cdef int write_all(int fd, iovec *parts, int count, long offset) noexcept nogil:
    """Write every part at *offset*; 0 or the errno."""
    cdef ssize_t done
    cdef int first = 0
    while first < count:
        done = pwritev(fd, parts + first, count - first, offset)
        if done < 0:
            if errno == EINTR:
                continue
            return errno
        if done == 0:
            return EIO
        offset += done
        while first < count and <size_t>done >= parts[first].iov_len:
            done -= parts[first].iov_len
            first += 1
        if first < count:
            parts[first].iov_base = <char *>parts[first].iov_base + done
            parts[first].iov_len -= done
    return 0


cdef int read_page(int fd, uint8_t *page, uint32_t page_size, long offset) noexcept nogil:
    cdef ssize_t got
    cdef uint32_t have = 0
    while have < page_size:
        got = pread(fd, page + have, page_size - have, offset + have)
        if got < 0:
            if errno == EINTR:
                continue
            return errno
        if got == 0:
            return EIO
        have += got
    return 0


cdef int clear_page(int fd, uint32_t page_size, uint64_t offset) noexcept nogil:
    cdef uint8_t zeros[MAX_PAGE]
    cdef uint32_t done = 0
    cdef iovec part
    cdef int error
    if punch(fd, offset, page_size) == 0:
        return 0
    if errno != EOPNOTSUPP:
        return errno
    memset(zeros, 0, MAX_PAGE)
    while done < page_size:
        part.iov_base = zeros
        part.iov_len = page_size - done if page_size - done < MAX_PAGE else MAX_PAGE
        done += part.iov_len
        error = write_all(fd, &part, 1, offset + done - part.iov_len)
        if error:
            return error
    return 0


cdef int store_delta(
    int fd, const uint8_t *encoded, uint32_t length, uint32_t page_size, uint64_t offset, uint64_t *sum
) noexcept nogil:
    """Patch the page at *offset*, whose sum is in *sum*; 0, the errno, or -1 for a broken encoding."""
    cdef uint8_t page[MAX_PAGE]
    cdef iovec part
    cdef uint64_t before = sum[0]
    cdef int error
    if page_size > MAX_PAGE:
        return -1
    error = read_page(fd, page, page_size, offset)
    if error:
        return error
    if not decode(encoded, length, page, page_size):
        return -1
    sum[0] = page_sum(page, page_size)
    if sum[0] == 0:
        return clear_page(fd, page_size, offset) if before != 0 else 0
    part.iov_base = page
    part.iov_len = page_size
    return write_all(fd, &part, 1, offset)


def store_records(
    int fd,
    const Row[::1] rows,
    Py_ssize_t first,
    const uint8_t[::1] data,
    uint32_t page_size,
    uint64_t[::1] sums,
):
    cdef Py_ssize_t i = first, run_start, count = rows.shape[0]
    cdef uint64_t offset, index, value, run_offset, mask = page_size - 1
    cdef uint64_t pages = sums.shape[0]
    cdef uint32_t flags
    cdef int error = 0, parts
    cdef iovec run[MAX_RUN]
    cdef const uint8_t *source
    if page_size < 32 or page_size % 32:
        raise ValueError("store_records: page size not a multiple of 32")
    with nogil:
        parts = 0
        run_start = first
        run_offset = 0
        while i < count:
            offset = rows[i].word & ~mask
            index = offset // page_size
            flags = rows[i].word & KINDS
            if index >= pages or not is_sound(&rows[i], data.shape[0], page_size):
                break
            if flags == PAGE:
                source = &data[rows[i].position]
                value = page_sum(source, page_size)
            else:
                source = NULL
                value = 0
            if parts and (
                flags != PAGE
                or value == 0
                or parts == MAX_RUN
                or offset != run_offset + <uint64_t>parts * page_size
            ):
                error = write_all(fd, run, parts, run_offset)
                parts = 0
                if error:
                    i = run_start
                    break
            if flags == PAGE and value != 0:
                if parts == 0:
                    run_offset = offset
                    run_start = i
                run[parts].iov_base = <void *>source
                run[parts].iov_len = page_size
                parts += 1
            elif flags == PAGE or flags == ZERO:
                if sums[index] != 0:
                    error = clear_page(fd, page_size, offset)
                    if error:
                        break
            elif flags == XBZRLE:
                source = &data[rows[i].position] if rows[i].length else NULL
                value = sums[index]
                error = store_delta(fd, source, rows[i].length, page_size, offset, &value)
                if error:
                    break
            else:
                break
            sums[index] = value
            i += 1
        if parts and not error:
            error = write_all(fd, run, parts, run_offset)
            if error:
                i = run_start
    return i, max(error, 0)
