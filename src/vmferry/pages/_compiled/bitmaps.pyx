# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Sets of pages as bitmaps: bit ``i % 64`` of word ``i // 64`` is page ``i``."""

from libc.stdint cimport uint64_t

cdef extern from *:
    int __builtin_ctzll(unsigned long long) nogil


cdef inline uint64_t ones(uint64_t word) noexcept nogil:
    """How many bits are set; in steps that a compiler turns into vectors."""
    word -= (word >> 1) & 0x5555555555555555ULL
    word = (word & 0x3333333333333333ULL) + ((word >> 2) & 0x3333333333333333ULL)
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fULL
    return (word * 0x0101010101010101ULL) >> 56


def count_pages(const uint64_t[::1] bitmap):
    cdef uint64_t count = 0
    cdef Py_ssize_t i
    with nogil:
        for i in range(bitmap.shape[0]):
            count += ones(bitmap[i])
    return count


def set_range(uint64_t[::1] bitmap, Py_ssize_t first, Py_ssize_t count):
    cdef Py_ssize_t i, last, stop
    cdef uint64_t head, tail
    if first < 0 or count < 0 or count > 64 * bitmap.shape[0] - first:
        raise ValueError("set_range: pages outside the bitmap")
    if count == 0:
        return
    stop = first + count - 1
    last = stop >> 6
    head = ~<uint64_t>0 << (first & 63)
    tail = ~<uint64_t>0 >> (63 - (stop & 63))
    i = first >> 6
    with nogil:
        if i == last:
            bitmap[i] |= head & tail
        else:
            bitmap[i] |= head
            for i in range(i + 1, last):
                bitmap[i] = ~<uint64_t>0
            bitmap[last] |= tail


def take_pages(uint64_t[::1] bitmap, Py_ssize_t first, Py_ssize_t limit, uint64_t[::1] out):
    cdef Py_ssize_t i, count = 0, end = 64 * bitmap.shape[0]
    cdef uint64_t rest, kept
    if first < 0 or limit < 0 or limit > out.shape[0]:
        raise ValueError("take_pages: a page before the first, or more pages than out has room for")
    with nogil:
        i = first >> 6
        kept = (<uint64_t>1 << (first & 63)) - 1
        while i < bitmap.shape[0] and count < limit:
            rest = bitmap[i] & ~kept
            kept &= bitmap[i]
            while rest != 0 and count < limit:
                out[count] = 64 * i + __builtin_ctzll(rest)
                count += 1
                rest &= rest - 1
            bitmap[i] = kept | rest
            kept = 0
            i += 1
    if count == limit:
        return (<Py_ssize_t>out[count - 1] + 1 if count else first), count
    return max(first, end), count
