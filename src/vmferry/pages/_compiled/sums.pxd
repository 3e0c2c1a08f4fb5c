# cython: language_level=3
from libc.stdint cimport uint8_t, uint64_t

cdef uint64_t page_sum(const uint8_t *p, size_t size) noexcept nogil
