"""How long processors have waited for memory: capability ``postcopy-blocktime``.

QEMU 7.2 ``mark_postcopy_blocktime_begin`` and ``_end`` in ``migration/postcopy-ram.c``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Times = npt.NDArray[np.float64]


class Waits:
    """Adds up in *times* for how many seconds each of *threads* waited, and last all of them.

    *threads* are the kernel's ids; others that wait are not counted.
    """

    def __init__(
        self,
        threads: Sequence[int],
        times: Times,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = {thread: index for index, thread in enumerate(threads)}
        self._times = times
        self._clock = clock
        self._waiting: dict[int, tuple[int, float]] = {}

    def begin(self, thread: int, page: int) -> None:
        """A thread waits for a page from now on, by its number among all."""
        if thread in self._index:
            self._waiting[thread] = page, self._clock()

    def end(self, page: int) -> None:
        """The page is in its place, and nobody waits for it any more."""
        if any(wanted == page for wanted, _ in self._waiting.values()):
            self._end(lambda wanted: wanted == page)

    def end_all(self) -> None:
        """Nobody waits for anything."""
        self._end(lambda _: True)

    def _end(self, is_there: Callable[[int], bool]) -> None:
        now = self._clock()
        if len(self._waiting) == len(self._index) and self._waiting:
            self._times[-1] += now - max(since for _, since in self._waiting.values())
        for thread, (page, since) in list(self._waiting.items()):
            if is_there(page):
                self._times[self._index[thread]] += now - since
                del self._waiting[thread]
