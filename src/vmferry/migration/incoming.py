"""The memory of a machine that waits for its state, as it fills."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.memory import PAGE_SIZE, REGION, MemoryBlock
from vmferry.pages import KINDS, PAGE, Rows, apply_records
from vmferry.pages.placing import place_rows

from .postcopy.missing import EARLY
from .runs import Runs

_DENSE: Final = 64
"""Pages of a region that come at once for all of it to become one huge page.

A packet of multifd has 128 pages: where half of the pages have content, memory is hardly wasted.
"""

_PAGES: Final = REGION // PAGE_SIZE


class IncomingBlock:
    """One RAM block that pages are put into, by several threads at once.

    Taking memory is most of the work.  Where many pages of a region come that have none yet, the
    kernel is asked for a huge page instead of small ones.  *received* gets a mark for each page
    that has come.
    """

    def __init__(self, block: MemoryBlock, received: npt.NDArray[np.uint8] | None = None) -> None:
        self._block = block
        self._received = received
        self.has_content = False
        """Whether any page has come."""
        self._known = block.populated()
        # What does not fill a region stays as it is; and where pages are to be missed one by one,
        # there are no huge ones.
        self._tried = np.full(block.size // REGION, received is not None)
        self._locks = [threading.Lock() for _ in range(16)]

    def place(self, rows: Rows, data: memoryview) -> None:
        """Put pages in their place; see :func:`place_rows`."""
        self.has_content = True
        words = rows["word"]
        self._take_memory(words[words & np.uint64(KINDS) == PAGE] // np.uint64(PAGE_SIZE))
        place_rows(self._place, rows, data, PAGE_SIZE)
        if self._received is not None:
            self._received[(words // np.uint64(PAGE_SIZE)).astype(np.intp)] = EARLY

    def _place(self, rows: Rows, first: int, data: memoryview) -> int:
        block = self._block
        return apply_records(block.array, rows, first, data, PAGE_SIZE, self._known, block.fd)

    def room(self, runs: Runs) -> memoryview:
        """The memory of the block, to receive pages into that have content."""
        self.has_content = True
        for first, last in runs:
            for region in range(first // _PAGES, -(-last // _PAGES)):
                start = region * _PAGES
                if min(last, start + _PAGES) - max(first, start) >= _DENSE:
                    self._take_region(region)
            self._known[first:last] = 1
        return self._block.view

    def _take_memory(self, pages: npt.NDArray[np.uint64]) -> None:
        if not len(pages) or self._tried.all():
            return
        regions = pages // np.uint64(_PAGES)
        first = int(regions.min())
        counts = np.bincount((regions - np.uint64(first)).astype(np.intp))
        for region in np.flatnonzero(counts >= _DENSE).tolist():
            self._take_region(first + region)

    def _take_region(self, region: int) -> None:
        """Once for each region; whoever comes meanwhile waits for it."""
        if region < len(self._tried) and not self._tried[region]:
            with self._locks[region % len(self._locks)]:
                if not self._tried[region]:
                    self._collapse(region)
                    self._tried[region] = True

    def _collapse(self, region: int) -> None:
        pages = slice(region * _PAGES, (region + 1) * _PAGES)
        if np.count_nonzero(self._known[pages]) > _PAGES - _DENSE:
            return
        try:
            self._block.collapse(region)
        except OSError:
            return  # no such call, or no such page: it gets small ones
        self._known[pages] = 1
