# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Page sums: XXH64, and 0 for a zero page."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from .page cimport is_zero

cdef extern from "<endian.h>" nogil:
    uint64_t le64toh(uint64_t)


cdef inline uint64_t rotl(uint64_t v, int n) noexcept nogil:
    return (v << n) | (v >> (64 - n))


cdef uint64_t P1 = 0x9E3779B185EBCA87ULL
cdef uint64_t P2 = 0xC2B2AE3D27D4EB4FULL
cdef uint64_t P3 = 0x165667B19E3779F9ULL
cdef uint64_t P4 = 0x85EBCA77C2B2AE63ULL


cdef uint64_t xxh64(const uint8_t *p, size_t size) noexcept nogil:
    """XXH64 with seed 0 of *size* bytes, a multiple of 32."""
    cdef uint64_t v1 = P1 + P2, v2 = P2, v3 = 0, v4 = 0 - P1
    cdef uint64_t a, b, c, d, h
    cdef size_t at = 0
    while at < size:
        memcpy(&a, p + at, 8)
        memcpy(&b, p + at + 8, 8)
        memcpy(&c, p + at + 16, 8)
        memcpy(&d, p + at + 24, 8)
        v1 = rotl(v1 + le64toh(a) * P2, 31) * P1
        v2 = rotl(v2 + le64toh(b) * P2, 31) * P1
        v3 = rotl(v3 + le64toh(c) * P2, 31) * P1
        v4 = rotl(v4 + le64toh(d) * P2, 31) * P1
        at += 32
    h = rotl(v1, 1) + rotl(v2, 7) + rotl(v3, 12) + rotl(v4, 18)
    h = (h ^ (rotl(v1 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v2 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v3 * P2, 31) * P1)) * P1 + P4
    h = (h ^ (rotl(v4 * P2, 31) * P1)) * P1 + P4
    h += size
    h ^= h >> 33
    h *= P2
    h ^= h >> 29
    h *= P3
    return h ^ (h >> 32)


cdef uint64_t page_sum(const uint8_t *p, size_t size) noexcept nogil:
    cdef uint64_t value
    if is_zero(p, size):
        return 0
    value = xxh64(p, size)
    return value if value != 0 else 1


def page_sums(const uint8_t[::1] data, Py_ssize_t page_size, uint64_t[::1] sums):
    cdef Py_ssize_t i, count
    if page_size < 32 or page_size % 32:
        raise ValueError("page_sums: page size not a multiple of 32")
    count = data.shape[0] // page_size
    if sums.shape[0] < count:
        raise ValueError("page_sums: sums too short")
    with nogil:
        for i in range(count):
            sums[i] = page_sum(&data[i * page_size], page_size)
