# cython: language_level=3
"""What the kernels share: rows, the kinds of records, big-endian numbers, the zero test."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t)
    uint64_t htobe64(uint64_t)
    uint32_t be32toh(uint32_t)
    uint32_t htobe32(uint32_t)
    uint16_t be16toh(uint16_t)
    uint16_t htobe16(uint16_t)

cdef struct Row:
    uint64_t word
    uint64_t position
    uint32_t length
    uint32_t unused

cdef enum:
    ZERO = 0x002
    PAGE = 0x008
    CONTINUE = 0x020
    XBZRLE = 0x040
    COMPRESS = 0x100
    KINDS = 0x14a
    MAX_PAGE = 65536


cdef inline uint64_t load_be64(const uint8_t *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return be64toh(v)


cdef inline uint32_t load_be32(const uint8_t *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return be32toh(v)


cdef inline uint16_t load_be16(const uint8_t *p) noexcept nogil:
    cdef uint16_t v
    memcpy(&v, p, 2)
    return be16toh(v)


cdef inline void store_be64(uint8_t *p, uint64_t v) noexcept nogil:
    v = htobe64(v)
    memcpy(p, &v, 8)


cdef inline void store_be32(uint8_t *p, uint32_t v) noexcept nogil:
    v = htobe32(v)
    memcpy(p, &v, 4)


cdef inline void store_be16(uint8_t *p, uint16_t v) noexcept nogil:
    v = htobe16(v)
    memcpy(p, &v, 2)


cdef inline bint is_zero(const uint8_t *p, size_t size) noexcept nogil:
    cdef uint64_t head
    memcpy(&head, p, 8)
    return head == 0 and memcmp(p, p + 8, size - 8) == 0


cdef inline bint is_page_size(uint32_t size) noexcept nogil:
    """A power of two with room for the flags of a record below it."""
    return size >= 1024 and size & (size - 1) == 0


cdef inline uint32_t compress_bound(uint32_t page_size) noexcept nogil:
    return page_size + (page_size >> 12) + (page_size >> 14) + 13


cdef inline bint is_sound(const Row *row, uint64_t total, uint32_t page_size) noexcept nogil:
    """Whether the row is a page record, with a payload of a right length within *total* bytes."""
    cdef uint32_t kind = row.word & (page_size - 1) & ~<uint64_t>CONTINUE
    if kind == ZERO:
        return row.length == 1
    if kind == PAGE:
        if row.length != page_size:
            return False
    elif kind == XBZRLE:
        if row.length > page_size or row.length > 0xffff:
            return False
    elif kind != COMPRESS or row.length > compress_bound(page_size):
        return False
    return row.position <= total and row.length <= total - row.position
