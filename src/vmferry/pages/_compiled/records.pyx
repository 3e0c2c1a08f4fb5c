# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Records as on the wire, found and written.  Layout: QEMU 7.2 ``migration/ram.c``."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from .page cimport (
    COMPRESS,
    CONTINUE,
    KINDS,
    PAGE,
    XBZRLE,
    ZERO,
    Row,
    compress_bound,
    is_sound,
    load_be16,
    load_be32,
    load_be64,
    store_be16,
    store_be32,
    store_be64,
)


def scan_records(
    const uint8_t[::1] data,
    Py_ssize_t start,
    Py_ssize_t stop,
    uint32_t page_size,
    uint64_t block_size,
    const uint8_t[::1] name,
    Row[::1] rows,
):
    cdef Py_ssize_t at = start, p, count = 0, capacity = rows.shape[0]
    cdef Py_ssize_t name_size = name.shape[0]
    cdef uint64_t word, mask = page_size - 1
    cdef uint32_t flags, length, bound = compress_bound(page_size)
    cdef const uint8_t *base
    if start < 0 or stop > data.shape[0] or start >= stop or capacity == 0 or name_size == 0:
        return start, 0
    base = &data[0]
    with nogil:
        while count < capacity and stop - at >= 9:
            word = load_be64(base + at)
            flags = word & mask
            if block_size < page_size or (word & ~mask) > block_size - page_size:
                break
            p = at + 8
            if not flags & CONTINUE:
                if stop - p < name_size or memcmp(base + p, &name[0], name_size) != 0:
                    break
                p += name_size
            flags &= ~<uint32_t>CONTINUE
            if flags == PAGE:
                length = page_size
            elif flags == ZERO:
                if stop - p < 1 or base[p] != 0:
                    break
                length = 1
            elif flags == XBZRLE:
                if stop - p < 3 or base[p] != 1:
                    break
                length = load_be16(base + p + 1)
                if length > page_size:
                    break
                p += 3
            elif flags == COMPRESS:
                if stop - p < 4:
                    break
                length = load_be32(base + p)
                if length > bound:
                    break
                p += 4
            else:
                break
            if stop - p < length:
                break
            rows[count].word = word
            rows[count].position = p
            rows[count].length = length
            rows[count].unused = 0
            count += 1
            at = p + length
    return at, count


def pack_records(
    const Row[::1] rows,
    Py_ssize_t first,
    const uint8_t[::1] data,
    uint32_t page_size,
    const uint8_t[::1] name,
    uint8_t[::1] out,
):
    cdef Py_ssize_t i = first, at = 0, size, room = out.shape[0], name_size = name.shape[0]
    cdef uint64_t word
    cdef uint32_t flags, length
    cdef bint sound = True
    if rows.shape[0] <= first:
        return first, 0
    with nogil:
        while i < rows.shape[0]:
            sound = is_sound(&rows[i], data.shape[0], page_size)
            if not sound:
                break
            word = rows[i].word
            length = rows[i].length
            flags = word & KINDS
            size = 8 + (0 if word & CONTINUE else name_size) + length
            if flags == XBZRLE:
                size += 3
            elif flags == COMPRESS:
                size += 4
            if room - at < size:
                break
            store_be64(&out[at], word)
            at += 8
            if not word & CONTINUE:
                memcpy(&out[at], &name[0], name_size)
                at += name_size
            if flags == ZERO:
                memset(&out[at], 0, length)
            else:
                if flags == XBZRLE:
                    out[at] = 1
                    store_be16(&out[at + 1], length)
                    at += 3
                elif flags == COMPRESS:
                    store_be32(&out[at], length)
                    at += 4
                if length:
                    memcpy(&out[at], &data[rows[i].position], length)
            at += length
            i += 1
    if not sound:
        raise ValueError("pack_records: a row is no page record, or points outside the data")
    return i, at
