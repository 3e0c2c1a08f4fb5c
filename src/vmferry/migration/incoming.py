"""The memory of a machine that waits for its state, as it fills."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np

from vmferry.memory import PAGE_SIZE, REGION, MemoryBlock
from vmferry.pages import KINDS, PAGE, Rows, apply_records
from vmferry.pages.placing import place_rows

_DENSE: Final = 64
"""Pages of a region that come at once for all of it to become one huge page.

A packet of multifd has 128 pages: where half of the pages have content, memory is hardly wasted.
"""

_PAGES: Final = REGION // PAGE_SIZE


class IncomingBlock:
    """One RAM block that pages are put into, by several threads at once.

    Taking memory is most of the work.  Where many pages of a region come that have none yet, the
    kernel is asked for a huge page instead of small ones.
    """

    def __init__(self, block: MemoryBlock) -> None:
        self._block = block
        self._known = block.populated()
        # What does not fill a region stays as it is.
        self._tried = np.zeros(block.size // REGION, np.bool_)
        self._lock = threading.Lock()

    def place(self, rows: Rows, data: memoryview) -> None:
        """Put pages in their place; see :func:`place_rows`."""
        self._take_memory(rows)
        place_rows(self._place, rows, data, PAGE_SIZE)

    def _place(self, rows: Rows, first: int, data: memoryview) -> int:
        block = self._block
        return apply_records(block.array, rows, first, data, PAGE_SIZE, self._known, block.fd)

    def _take_memory(self, rows: Rows) -> None:
        if self._tried.all():
            return
        words = rows["word"]
        pages = words[words & np.uint64(KINDS) == PAGE] // np.uint64(PAGE_SIZE)
        pages = pages[pages < len(self._tried) * _PAGES]
        counts = np.bincount((pages // np.uint64(_PAGES)).astype(np.intp))
        for region in np.flatnonzero(counts >= _DENSE).tolist():
            with self._lock:
                tried, self._tried[region] = self._tried[region], True
            if not tried:
                self._collapse(region)

    def _collapse(self, region: int) -> None:
        pages = slice(region * _PAGES, (region + 1) * _PAGES)
        if np.count_nonzero(self._known[pages]) > _PAGES - _DENSE:
            return
        try:
            self._block.collapse(region)
        except OSError:
            return  # no such call, or no such page: it gets small ones
        self._known[pages] = 1
