# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Pages as what changed in them since they were sent last."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from vmferry.pages.cache import XbzrlePacked

from .page cimport (
    CONTINUE,
    PAGE,
    XBZRLE,
    ZERO,
    is_page_size,
    is_zero,
    load_be16,
    store_be16,
    store_be64,
)
from .xbzrle cimport encode

cdef enum:
    MAX_PAGE = 16384  # the largest target page of any machine
    LIFETIME = 2  # generations that a page keeps its slot, QEMU 7.2 migration/page_cache.c

cdef uint64_t EMPTY = ~<uint64_t>0

cdef struct Slot:
    uint64_t *tag
    uint64_t *generation
    uint8_t *content

cdef struct Counts:
    Py_ssize_t zeros
    Py_ssize_t normal
    Py_ssize_t pages
    Py_ssize_t bytes
    Py_ssize_t misses
    Py_ssize_t overflows


cdef inline bint insert(
    Slot *slot, uint64_t tag, uint64_t generation, const uint8_t *page, uint32_t page_size
) noexcept nogil:
    """Put *page* (zeros where it is NULL) into its slot, unless another page has a right to it."""
    if slot.tag[0] not in (tag, EMPTY) and slot.generation[0] + LIFETIME > generation:
        return False
    slot.tag[0] = tag
    slot.generation[0] = generation
    if page == NULL:
        memset(slot.content, 0, page_size)
    else:
        memcpy(slot.content, page, page_size)
    return True


cdef inline uint32_t encoded(
    Slot *slot,
    uint64_t generation,
    bint last,
    const uint8_t *page,
    int page_size,
    uint8_t *payload,
    Counts *counts,
) noexcept nogil:
    """The kind of record for a page that is in its slot, with the payload of XBZRLE; 0 for none."""
    cdef int length = encode(slot.content, page, page_size, payload + 3, page_size)
    counts.pages += 1
    slot.generation[0] = generation
    if length == 0:
        return 0
    if last:
        slot.tag[0] = EMPTY
    else:
        memcpy(slot.content, page, page_size)
    if length < 0:
        counts.overflows += 1
        counts.bytes += page_size
        return PAGE
    payload[0] = 1
    store_be16(payload + 1, length)
    return XBZRLE


cdef inline uint32_t packed(
    Slot *slot,
    uint64_t tag,
    uint64_t generation,
    bint last,
    const uint8_t *source,
    int page_size,
    uint8_t *payload,
    Counts *counts,
) noexcept nogil:
    """Write the payload of a page; the kind of its record, 0 for none."""
    cdef uint8_t page[MAX_PAGE]
    cdef uint32_t kind = PAGE
    if is_zero(source, page_size):
        if not last:
            insert(slot, tag, generation, NULL, page_size)
        elif slot.tag[0] == tag:
            slot.tag[0] = EMPTY
        counts.zeros += 1
        payload[0] = 0
        return ZERO
    # The guest may write meanwhile: what is encoded, sent and kept is this one copy.
    memcpy(page, source, page_size)
    if slot.tag[0] == tag:
        kind = encoded(slot, generation, last, page, page_size, payload, counts)
    else:
        counts.misses += 1
        if not last:
            insert(slot, tag, generation, page, page_size)
    if kind == PAGE:
        counts.normal += 1
        memcpy(payload, page, page_size)
    return kind


def pack_pages_xbzrle(
    cache,
    const uint8_t[::1] memory,
    const uint64_t[::1] pages,
    Py_ssize_t first,
    uint32_t page_size,
    const uint8_t[::1] name,
    bint named,
    uint64_t base,
    uint64_t generation,
    bint last_stage,
    uint8_t[::1] out,
):
    cdef uint64_t[::1] tags, generations
    cdef uint8_t[::1] content
    cdef uint64_t page, at_slot, total
    cdef Py_ssize_t i = first, at = 0, head, room = out.shape[0]
    cdef uint32_t kind
    cdef bint outside = False
    cdef Slot slot
    cdef Counts counts
    if not is_page_size(page_size) or page_size > MAX_PAGE or page_size != cache.page_size:
        raise ValueError("pack_pages_xbzrle: page size not that of the cache, or above 16384")
    if first < 0 or named and name.shape[0] == 0:
        raise ValueError("pack_pages_xbzrle: a page before the first, or a name without bytes")
    total = memory.shape[0] // page_size
    memset(&counts, 0, sizeof(counts))
    with cache.lock:
        tags, generations, content = cache.tags, cache.generations, cache.content
        with nogil:
            while i < pages.shape[0]:
                page = pages[i]
                outside = page >= total
                head = 8 + (name.shape[0] if named else 0)
                if outside or room - at < head + 3 + page_size:
                    break
                at_slot = (base + page) & (tags.shape[0] - 1)
                slot.tag = &tags[at_slot]
                slot.generation = &generations[at_slot]
                slot.content = &content[at_slot * page_size]
                kind = packed(
                    &slot,
                    base + page,
                    generation,
                    last_stage,
                    &memory[page * page_size],
                    page_size,
                    &out[at + head],
                    &counts,
                )
                i += 1
                if kind == 0:
                    continue
                store_be64(&out[at], page * page_size | kind | (0 if named else CONTINUE))
                if named:
                    memcpy(&out[at + 8], &name[0], name.shape[0])
                at += head
                if kind == XBZRLE:
                    counts.bytes += head - 8 + 3 + load_be16(&out[at + 1])
                    at += 3 + load_be16(&out[at + 1])
                else:
                    at += 1 if kind == ZERO else page_size
                named = False
    if outside:
        raise ValueError("pack_pages_xbzrle: a page outside the memory")
    return XbzrlePacked(
        i, at, counts.zeros, counts.normal, counts.pages, counts.bytes, counts.misses, counts.overflows
    )
