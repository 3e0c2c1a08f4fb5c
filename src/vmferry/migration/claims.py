"""Keeping two channels from storing the same page at the same time.

QEMU 7.2 ``migration/multifd.c`` now and then sends a page twice in a row, in two packets that may
go through two channels, and a hostile source may do so always.  What was stored would then be half
of each, or the content of one with the sum of the other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from vmferry.wire.ram import RamBlock

Pages = Sequence[slice | npt.NDArray[np.uint64]]
"""Pages by number: runs of them, and any others."""


class PageClaims:
    """Knows the pages that are being stored; a byte for each page of the guest."""

    def __init__(self) -> None:
        self._freed = threading.Condition()
        self._claimed: dict[str, npt.NDArray[np.bool_]] = {}

    def announce(self, blocks: Iterable[RamBlock], page_size: int) -> None:
        """Guest memory is known; before the first claim."""
        self._claimed = {b.name: np.zeros(b.length // page_size, np.bool_) for b in blocks}

    @contextmanager
    def held(self, block: str, pages: Pages) -> Iterator[None]:
        """Within, these pages of a block are nobody else's; waits until they are free."""
        claimed = self._claimed[block]
        with self._freed:
            while any(claimed[part].any() for part in pages):
                self._freed.wait()
            for part in pages:
                claimed[part] = True
        try:
            yield
        finally:
            with self._freed:
                for part in pages:
                    claimed[part] = False
                self._freed.notify_all()
