"""What the destination holds of pages that were sent, so that changes alone can be sent next.

QEMU 7.2 ``migration/page_cache.c`` and ``save_xbzrle_page`` in ``migration/ram.c``.
"""

from __future__ import annotations

import threading
from typing import Final, NamedTuple

import numpy as np

from vmferry.errors import UsageError

EMPTY: Final = np.uint64((1 << 64) - 1)
"""The tag of a slot without a page."""
_STEP: Final = 256
"""Pages copied at once while resizing."""


class XbzrlePacked(NamedTuple):
    """What :func:`vmferry.pages.pack_pages_xbzrle` did, in QEMU's terms (``xbzrle-cache``)."""

    following: int
    """Index of the first page not packed."""
    size: int
    """Bytes written."""
    zeros: int
    """Pages sent as ZERO."""
    normal: int
    """Pages sent whole."""
    pages: int
    """Pages found in the cache, whatever came of it: also those that had not changed."""
    bytes: int
    """What was sent of those: records without their word (8 bytes), or a page on overflow."""
    cache_miss: int
    overflow: int


class XbzrleCache:
    """Copies of pages as the destination holds them, one for each slot; nothing else is in here.

    A page's slot is its number in all of RAM, modulo the slots, which are a power of two.  A page
    that was used in this dirty-sync generation or the one before keeps its slot.  Each page takes
    memory once it is cached.

    Whatever sends a page past :func:`~vmferry.pages.pack_pages_xbzrle` breaks this, so the cache
    starts empty when the first round is over, and dies with its migration.
    """

    def __init__(self, size: int, page_size: int) -> None:
        """Room for *size* bytes of pages of *page_size*: ``xbzrle-cache-size``."""
        self.page_size = page_size
        self.lock = threading.Lock()
        self._allocate(size)

    @property
    def size(self) -> int:
        """Bytes of pages that it holds when full."""
        return len(self.tags) * self.page_size

    def _allocate(self, size: int) -> None:
        slots = size // self.page_size
        if slots < 1 or size != slots * self.page_size or slots & (slots - 1):
            raise UsageError(
                f"xbzrle-cache-size must be a power of two of at least one page"
                f" ({self.page_size} bytes), not {size}"
            )
        try:
            tags, generations = np.full(slots, EMPTY), np.zeros(slots, np.uint64)
            content = np.zeros(size, np.uint8)
        except MemoryError:
            raise UsageError(f"no memory for an xbzrle-cache-size of {size} bytes") from None
        self.tags, self.generations, self.content = tags, generations, content

    def resize(self, size: int) -> None:
        """Make room for *size* bytes; of pages that now share a slot the last used one stays.

        May be called by any thread while pages are packed; needs memory for both sizes meanwhile.
        """
        with self.lock:
            tags, generations = self.tags, self.generations
            content = self.content.reshape(-1, self.page_size)
            self._allocate(size)
            held = np.flatnonzero(tags != EMPTY)
            held = held[np.argsort(generations[held], kind="stable")[::-1]]  # last used first
            slots, chosen = np.unique(tags[held] % np.uint64(len(self.tags)), return_index=True)
            held = held[chosen]
            self.tags[slots] = tags[held]
            self.generations[slots] = generations[held]
            target = self.content.reshape(-1, self.page_size)
            for at in range(0, len(held), _STEP):
                target[slots[at : at + _STEP]] = content[held[at : at + _STEP]]
