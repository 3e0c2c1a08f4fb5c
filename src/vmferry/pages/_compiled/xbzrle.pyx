# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""XBZRLE, QEMU 7.2 ``migration/xbzrle.c``."""

from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy


cdef int uleb(const uint8_t *p, Py_ssize_t left, uint32_t *value) noexcept nogil:
    """Bytes taken by the number at *p*: 1 or 2; 0 where there is none."""
    if left < 1:
        return 0
    if p[0] < 0x80:
        value[0] = p[0]
        return 1
    if left < 2 or p[1] >= 0x80:
        return 0
    value[0] = (p[0] & 0x7f) | (<uint32_t>p[1] << 7)
    return 2


cdef bint apply_xbzrle(
    const uint8_t *p, Py_ssize_t size, uint8_t *page, uint32_t page_size
) noexcept nogil:
    cdef Py_ssize_t at = 0
    cdef uint32_t position = 0, run = 0
    cdef int taken
    while at < size:
        if size - at < 2:
            return False
        taken = uleb(p + at, size - at, &run)
        if taken == 0 or (run == 0 and at != 0) or run > page_size - position:
            return False
        at += taken
        position += run
        taken = uleb(p + at, size - at, &run)
        if taken == 0 or run == 0 or run > page_size - position:
            return False
        at += taken
        if run > size - at:
            return False
        memcpy(page + position, p + at, run)
        at += run
        position += run
    return True


def xbzrle_decode(const uint8_t[::1] encoded, uint8_t[::1] page):
    cdef bint done = True
    cdef Py_ssize_t size = encoded.shape[0]
    if size and page.shape[0]:
        with nogil:
            done = apply_xbzrle(&encoded[0], size, &page[0], page.shape[0])
    return done or size == 0
