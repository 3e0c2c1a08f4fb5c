# cython: language_level=3
from libc.stdint cimport uint8_t

cdef int encode(
    const uint8_t *old, const uint8_t *new, int size, uint8_t *out, int room
) noexcept nogil
cdef int decode(const uint8_t *encoded, int size, uint8_t *page, int page_size) noexcept nogil
