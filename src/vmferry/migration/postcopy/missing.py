"""The memory of a machine that runs already, as its pages come: the pager's view of it.

QEMU 7.2 ``migration/postcopy-ram.c``.  What has come is a byte for each page, in memory that the
pager shares with the process of the machine: so it outlives the pager.  A page is marked when it is
in its place, and never before.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import StreamError
from vmferry.memory import PAGE_SIZE
from vmferry.memory.faults import place, place_zeros, read_faults, unregister, wake
from vmferry.pages import COMPRESS, PAGE
from vmferry.pages.compression import inflate_page
from vmferry.wire.ram import RamPages

MISSING: Final = 0
EARLY: Final = 1
"""It came in precopy, and was not discarded."""
PLACED: Final = 2

Marks = npt.NDArray[np.uint8]

_ROOM: Final = 256
"""Pages that are placed in one go."""


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """A RAM block in the process of the machine.

    ``first`` is the number of its first page among all, ``addresses`` where it is mapped.
    """

    name: str
    size: int
    first: int
    addresses: tuple[int, ...]


class MissingMemory:
    """Places pages in *blocks*, through the *descriptor* of their faults; *marks* as above."""

    def __init__(self, descriptor: int, marks: Marks, blocks: Sequence[MappedBlock]) -> None:
        self._descriptor = descriptor
        self._marks = marks
        self._blocks = {block.name: block for block in blocks}
        self._asked = np.zeros(len(marks), np.bool_)
        self._mappings = sorted((a, block) for block in blocks for a in block.addresses)
        self._starts = [address for address, _ in self._mappings]
        self._room = np.empty((_ROOM, PAGE_SIZE), np.uint8)
        self.waited = 0
        self.requests = 0
        self.pages = 0

    def faults(self) -> list[tuple[str, int]]:
        """The pages that somebody waits for and nobody has asked for: block and number."""
        wanted = []
        for address in read_faults(self._descriptor):
            start, block = self._mappings[bisect_right(self._starts, address) - 1]
            page = (address - start) // PAGE_SIZE
            if self._marks[block.first + page]:
                # It came meanwhile, or it is zero and was not given memory so far.
                place_zeros(self._descriptor, block.addresses[0] + page * PAGE_SIZE)
                wake(self._descriptor, address)
            elif not self._asked[block.first + page]:
                self._asked[block.first + page] = True
                self.waited += 1
                self.requests += 1
                wanted.append((block.name, page))
        return wanted

    def place(self, batch: RamPages) -> None:
        """Put pages in their place, each at once, and wake who waits for them.

        A page that came before stays as it is: its guest may have written to it.  Raises
        :class:`StreamError` for one that was sent before the machine was stopped and not discarded,
        as nobody knows which of the two is the right one.
        """
        block = self._blocks[batch.block.name]
        marks = self._marks[block.first : block.first + block.size // PAGE_SIZE]
        pages = (batch.offsets // np.uint64(PAGE_SIZE)).astype(np.intp)
        kinds = batch.kinds
        found = marks[pages]
        if (found == EARLY).any():
            at = int(pages[found == EARLY][0]) * PAGE_SIZE
            raise StreamError(
                "each page once, unless it was discarded", f"{at:#x} again", block=block.name
            )
        new = found == MISSING
        whole, packed = new & (kinds == PAGE), new & (kinds == COMPRESS)
        self._copy(block, pages[whole], batch.rows["position"][whole], batch.data)
        if packed.any():
            self._copy(block, pages[packed], *_inflated(batch, packed))
        marks[pages] = PLACED
        self.pages += int(np.count_nonzero(new))
        if self.waited:
            self._wake(block, pages)

    def _copy(
        self,
        block: MappedBlock,
        pages: npt.NDArray[np.intp],
        positions: npt.NDArray[np.uint64],
        data: memoryview,
    ) -> None:
        source = np.frombuffer(data, np.uint8)
        base, room = block.addresses[0], self._room
        for start, end in _runs(pages, positions):
            at, count = int(positions[start]), end - start
            if count == 1:
                begin = source.ctypes.data + at
            else:
                step = int(positions[start + 1]) - at
                shape, steps = (count, PAGE_SIZE), (step, 1)
                room[:count] = np.lib.stride_tricks.as_strided(source[at:], shape, steps)
                begin = room.ctypes.data
            to = base + int(pages[start]) * PAGE_SIZE
            place(self._descriptor, to, begin, count * PAGE_SIZE)

    def _wake(self, block: MappedBlock, pages: npt.NDArray[np.intp]) -> None:
        asked = self._asked[block.first : block.first + block.size // PAGE_SIZE]
        for page in np.unique(pages[asked[pages]]).tolist():
            # A page of zeros was only marked.
            place_zeros(self._descriptor, block.addresses[0] + page * PAGE_SIZE)
            for address in block.addresses:
                wake(self._descriptor, address + page * PAGE_SIZE)
            asked[page] = False
            self.waited -= 1

    def have(self, name: str) -> bytes | None:
        """A bit for each page of a block that came, as in a recovery; ``None``: no such block."""
        block = self._blocks.get(name)
        if block is None:
            return None
        pages = block.size // PAGE_SIZE
        marks = self._marks[block.first : block.first + pages]
        return (
            np.packbits(marks != MISSING, bitorder="little")
            .tobytes()
            .ljust(-(-pages // 64) * 8, b"\0")
        )

    def ask_again(self) -> None:
        """Let everybody who waits fault once more, and so be asked for anew."""
        self._asked[:] = False
        self.waited = 0
        for address, block in self._mappings:
            wake(self._descriptor, address, block.size)

    def release(self) -> None:
        """No page is waited for any more: what has not come is zero."""
        for address, block in self._mappings:
            unregister(self._descriptor, address, block.size)


def _inflated(
    batch: RamPages, packed: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.uint64], memoryview]:
    """Where the pages are that came compressed, and the data that has them."""
    rows, data = batch.rows[packed], batch.data
    pages = [
        inflate_page(data[start : start + length], PAGE_SIZE)
        for _, start, length, _ in rows.tolist()
    ]
    return np.arange(len(pages), dtype=np.uint64) * np.uint64(PAGE_SIZE), memoryview(
        b"".join(pages)
    )


def _runs(pages: npt.NDArray[np.intp], positions: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Pages that follow each other, at equal distances in the data."""
    if len(pages) < 2:
        return [(0, len(pages))] if len(pages) else []
    steps = np.diff(positions.astype(np.int64))
    breaks = np.diff(pages) != 1
    breaks[1:] |= steps[1:] != steps[:-1]
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pages)]
    return [
        (at, min(at + _ROOM, end))
        for start, end in pairwise(edges)
        for at in range(start, end, _ROOM)
    ]
