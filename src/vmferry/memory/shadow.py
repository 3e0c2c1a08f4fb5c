"""A dirty log that keeps a copy and compares; it needs nothing of the kernel."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError, printable
from vmferry.pages import count_pages

from .bits import Bitmap, Flags, gathered, set_bits
from .blocks import GuestMemory, MemoryBlock
from .holes import PAGE_SIZE, populated

_WORDS: Final = PAGE_SIZE // 8
_STEP: Final = 64
"""Pages compared at a time, so that the result stays in the cache."""

Words = npt.NDArray[np.uint64]


class ShadowLog:
    """A page counts as written when it differs from the copy, which is then renewed.

    A page may change, be sent, and change back before it is compared: it would be the same as the
    copy, and yet not as what was sent.  Therefore :meth:`content` is the copy.  What is sent is
    what is compared, and that a page is torn, as it was being written while it was copied, does
    not matter: once it differs it is found.

    The copy takes as much memory as the guest's own that was ever touched, but that of blocks
    which are shared only if somebody asks for them.
    """

    name: Final = "shadow"

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._copies: dict[MemoryBlock, Words | None] = {}
        self._cleanup = ExitStack()

    def start(self) -> None:
        """See :meth:`DirtyLog.start`."""
        self.stop()
        with ExitStack() as cleanup:
            cleanup.callback(self._copies.clear)
            self._memory.watch(self._add)
            cleanup.callback(self._memory.unwatch, self._add)
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """See :meth:`DirtyLog.stop`."""
        self._cleanup.close()

    def content(self, block: MemoryBlock) -> memoryview:
        """See :meth:`DirtyLog.content`."""
        return self._copy(block).data.cast("B")

    def collect(self, block: MemoryBlock, into: Bitmap) -> int:
        """See :meth:`DirtyLog.collect`."""
        copy = self._copy(block)
        with gathered(block, into) as found:
            set_bits(found, 0, _renew(block, copy))
        return count_pages(found)

    def _add(self, block: MemoryBlock, address: int) -> None:
        if address == block.address:
            self._copies[block] = None
            if not block.shared:
                self._copy(block)

    def _copy(self, block: MemoryBlock) -> Words:
        try:
            copy = self._copies[block]
        except KeyError:
            raise UsageError(
                f"block {printable(block.name)} is in no dirty log that was started"
            ) from None
        if copy is None:
            copy = self._copies[block] = np.zeros((block.pages, _WORDS), np.uint64)
            _renew(block, copy)
        return copy


def _renew(block: MemoryBlock, copy: Words) -> Flags:
    """Make the copy equal to the block; which pages were not.  Holes are left alone."""
    live = block.array.view(np.uint64).reshape(-1, _WORDS)
    changed = populated(block.fd, block.address, 0, block.pages)
    for first in range(0, block.pages, _STEP):
        part = changed[first : first + _STEP]
        if part.all():
            here, there = live[first : first + _STEP], copy[first : first + _STEP]
            part[:] = (here != there).any(axis=1)
        elif part.any():
            pages = first + np.flatnonzero(part)
            part[part] = (live[pages] != copy[pages]).any(axis=1)
        if part.any():
            pages = first + np.flatnonzero(part)
            copy[pages] = live[pages]
    return changed
