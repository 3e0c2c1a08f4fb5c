# cython: language_level=3
from libc.stdint cimport uint8_t, uint32_t

cdef bint apply_xbzrle(
    const uint8_t *p, Py_ssize_t size, uint8_t *page, uint32_t page_size
) noexcept nogil
