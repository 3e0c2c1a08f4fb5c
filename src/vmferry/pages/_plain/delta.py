"""Pages as what changed in them since they were sent last."""

from __future__ import annotations

import numpy as np

from vmferry.pages.cache import EMPTY, XbzrleCache, XbzrlePacked
from vmferry.pages.rows import CONTINUE, PAGE, XBZRLE, ZERO

from .live import checked, is_zero, view
from .types import U8, U64, Memory
from .xbzrle import xbzrle_encode

_LIFETIME = 2
"""Generations that a page keeps its slot, QEMU 7.2 ``migration/page_cache.c``."""


def pack_pages_xbzrle(
    cache: XbzrleCache,
    memory: Memory,
    pages: U64,
    first: int,
    page_size: int,
    name: bytes,
    named: bool,
    base: int,
    generation: int,
    last_stage: bool,
    out: Memory,
) -> XbzrlePacked:
    """Write records of ``pages[first:]`` into *out*, while there is room for a whole page more.

    As :func:`pack_pages`, with XBZRLE records for pages that are in the *cache* and changed, and
    none for those that did not.  *base* is the number of the block's first page in all of RAM,
    *generation* counts the synchronisations of the dirty log.  What is sent of a page and what the
    cache keeps are one copy, whatever the guest writes meanwhile.

    In the *last_stage*, with the guest stopped, the cache takes no page any more, and forgets those
    that it could only keep by copying them.
    """
    size = page_size
    if size < 1024 or size > 16384 or size & (size - 1) or size != cache.page_size:
        raise ValueError("pack_pages_xbzrle: page size not that of the cache, or above 16384")
    if first < 0 or (named and not name):
        raise ValueError("pack_pages_xbzrle: a page before the first, or a name without bytes")
    memory, _, total = checked(memory, size, b"")
    room, at, following = view(out), 0, max(first, len(pages))
    with cache.lock:
        work = _Work(cache, generation, last_stage)
        for index, page in enumerate(pages[first:].tolist(), first):
            if page >= total:
                raise ValueError("pack_pages_xbzrle: a page outside the memory")
            head = name if named else b""
            if len(room) - at < 8 + len(head) + 3 + size:
                following = index
                break
            kind, payload = work.pack(base + page, memory[page * size : (page + 1) * size])
            if not kind:
                continue
            word = page * size | kind | (0 if named else CONTINUE)
            record = word.to_bytes(8) + head + payload
            room[at : at + len(record)] = record
            at, named = at + len(record), False
            work.bytes += len(head) + len(payload) if kind == XBZRLE else 0
    return XbzrlePacked(
        following, at, work.zeros, work.normal, work.pages, work.bytes, work.misses, work.overflows
    )


class _Work:
    """One call's way through the cache, and what it counts."""

    def __init__(self, cache: XbzrleCache, generation: int, last_stage: bool) -> None:
        self._cache = cache
        self._generation = generation
        self._last = last_stage
        self.zeros = self.normal = self.pages = self.bytes = self.misses = self.overflows = 0

    def pack(self, tag: int, memory: memoryview) -> tuple[int, bytes]:
        """The kind of a page's record, 0 for none, and its payload."""
        page = bytes(memory)
        slot = tag % len(self._cache.tags)
        hit = self._cache.tags[slot] == tag
        if is_zero(page):
            self.zeros += 1
            self._keep(slot, tag, page)
            return ZERO, b"\0"
        if not hit:
            self.misses += 1
            self._keep(slot, tag, page)
            self.normal += 1
            return PAGE, page
        return self._change(slot, tag, page)

    def _change(self, slot: int, tag: int, page: bytes) -> tuple[int, bytes]:
        """As :meth:`pack`, for a page that is in its slot."""
        out = bytearray(len(page))
        length = xbzrle_encode(self._content(slot), page, out)
        self.pages += 1
        self._cache.generations[slot] = self._generation
        if length == 0:
            return 0, b""
        self._keep(slot, tag, page)
        if length < 0:
            self.overflows += 1
            self.bytes += len(page)
            self.normal += 1
            return PAGE, page
        return XBZRLE, b"\1" + length.to_bytes(2) + out[:length]

    def _keep(self, slot: int, tag: int, page: bytes) -> None:
        """Keep what is sent of a page, if its slot is not another page's."""
        tags, generations = self._cache.tags, self._cache.generations
        if self._last:
            if tags[slot] == tag:
                tags[slot] = EMPTY
        elif tags[slot] in (tag, EMPTY) or generations[slot] + _LIFETIME <= self._generation:
            tags[slot] = tag
            generations[slot] = self._generation
            self._content(slot)[:] = np.frombuffer(page, np.uint8)

    def _content(self, slot: int) -> U8:
        size = self._cache.page_size
        return self._cache.content[slot * size : (slot + 1) * size]
