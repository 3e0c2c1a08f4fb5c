"""The memory of a machine that runs already, as its pages come: the pager's view of it.

QEMU 7.2 ``migration/postcopy-ram.c``.  What has come is a byte for each page, and so is what was
asked for, in memory that the pager shares with the process of the machine: so it outlives the
pager.  A page is marked when it is in its place, and never before.
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
from vmferry.pages import COMPRESS, KINDS, PAGE, ZERO
from vmferry.pages.compression import inflate_page
from vmferry.wire.ram import RamPages

from .waits import Waits

MISSING: Final = 0
EARLY: Final = 1
"""It came in precopy, and was not discarded."""
PLACED: Final = 2

Marks = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]

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
    """Places pages in *blocks*, through the *descriptor* of their faults.

    *marks* and *asked* as above.  *waits* counts how long who waits does so.
    """

    def __init__(
        self,
        descriptor: int,
        marks: Marks,
        asked: Flags,
        blocks: Sequence[MappedBlock],
        waits: Waits,
    ) -> None:
        self._descriptor = descriptor
        self._marks = marks
        self._asked = asked
        self._waits = waits
        self._blocks = {block.name: block for block in blocks}
        self._mappings = sorted((a, block) for block in blocks for a in block.addresses)
        self._starts = [address for address, _ in self._mappings]
        self._room = np.empty((_ROOM, PAGE_SIZE), np.uint8)
        self.waited = 0
        self.requests = 0
        self.pages = 0

    def faults(self) -> list[tuple[str, int]]:
        """The pages that somebody waits for and nobody has asked for: block and number."""
        wanted = []
        for address, thread in read_faults(self._descriptor):
            start, block = self._mappings[bisect_right(self._starts, address) - 1]
            page = (address - start) // PAGE_SIZE
            if self._marks[block.first + page]:
                # It came meanwhile, or it is zero and was not given memory so far.
                place_zeros(self._descriptor, block.addresses[0] + page * PAGE_SIZE)
                wake(self._descriptor, address)
                continue
            self._waits.begin(thread, block.first + page)
            if not self._asked[block.first + page]:
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
        if len(batch.rows) == 1:
            return self._place_one(block, batch)
        marks = self._marks[block.first : block.first + block.size // PAGE_SIZE]
        pages = (batch.rows["word"] // np.uint64(PAGE_SIZE)).astype(np.intp)
        kinds = batch.kinds
        found = marks[pages]
        new = found == MISSING
        if not new.all() and (found == EARLY).any():
            raise _again(block, int(pages[found == EARLY][0]))
        whole = new & (kinds == PAGE)
        if whole.all():
            self._copy(block, pages, batch.rows["position"], batch.data)
        else:
            self._copy(block, pages[whole], batch.rows["position"][whole], batch.data)
            packed = new & (kinds == COMPRESS)
            if packed.any():
                self._copy(block, pages[packed], *_inflated(batch, packed))
        marks[pages] = PLACED
        self.pages += int(np.count_nonzero(new))
        if self.waited:
            asked = self._asked[block.first : block.first + block.size // PAGE_SIZE]
            wanted = asked[pages]
            for page, kind in zip(pages[wanted].tolist(), kinds[wanted].tolist(), strict=True):
                self._wake(block, page, is_zero=kind == ZERO)
        return None

    def _place_one(self, block: MappedBlock, batch: RamPages) -> None:
        """One page, as it comes where somebody waits for it: numpy takes its time to begin."""
        word, position, _, _ = batch.rows[0].item()
        page = word // PAGE_SIZE
        number = block.first + page
        mark = self._marks[number]
        if mark == EARLY:
            raise _again(block, page)
        if mark == MISSING:
            kind = word & KINDS
            if kind == COMPRESS:
                _, data = _inflated(batch, np.ones(1, np.bool_))
                position = 0
            else:
                data = batch.data
            if kind != ZERO:
                start = _address(data) + position
                to = block.addresses[0] + page * PAGE_SIZE
                place(self._descriptor, to, start, PAGE_SIZE)
            self._marks[number] = PLACED
            self.pages += 1
        if self._asked[number]:
            self._wake(block, page, is_zero=bool(word & ZERO))

    def _copy(
        self,
        block: MappedBlock,
        pages: npt.NDArray[np.intp],
        positions: npt.NDArray[np.uint64],
        data: memoryview,
    ) -> None:
        base, room = block.addresses[0], self._room
        origin, gathered = _address(data), _address(room.data.cast("B"))
        for start, end in _runs(pages, positions):
            at, count = int(positions[start]), end - start
            begin = origin + at
            if count > 1:
                steps = int(positions[start + 1]) - at, 1
                shape = count, PAGE_SIZE
                room[:count] = np.ndarray(shape, np.uint8, data, at, steps)
                begin = gathered
            to = base + int(pages[start]) * PAGE_SIZE
            place(self._descriptor, to, begin, count * PAGE_SIZE)

    def _wake(self, block: MappedBlock, page: int, *, is_zero: bool) -> None:
        """Whoever waits for a page goes on: it is in its place, or zero and was only marked."""
        if is_zero:
            place_zeros(self._descriptor, block.addresses[0] + page * PAGE_SIZE)
        for address in block.addresses:
            wake(self._descriptor, address + page * PAGE_SIZE)
        self._waits.end(block.first + page)
        if self._asked[block.first + page]:  # it may be in a batch twice
            self._asked[block.first + page] = False
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

    def again(self) -> list[tuple[str, int]]:
        """All that was asked for and has not come: block and number.

        Also what nobody waits for any more, as a vCPU that was interrupted: the source may send it
        apart from all the rest, and its end must not come first.  Who waits does so once more,
        for what was placed and not told, too.
        """
        self._asked &= self._marks == MISSING
        self.waited = int(np.count_nonzero(self._asked))
        self._waits.end_all()
        for address, block in self._mappings:
            wake(self._descriptor, address, block.size)
        return [
            (block.name, page)
            for block in self._blocks.values()
            for page in np.flatnonzero(
                self._asked[block.first : block.first + block.size // PAGE_SIZE]
            ).tolist()
        ]

    def release(self) -> None:
        """No page is waited for any more: what has not come is zero."""
        for address, block in self._mappings:
            unregister(self._descriptor, address, block.size)
        self._waits.end_all()


def _again(block: MappedBlock, page: int) -> StreamError:
    return StreamError(
        "each page once, unless it was discarded", f"{page * PAGE_SIZE:#x} again", block=block.name
    )


def _address(data: memoryview) -> int:
    """Where *data* begins in memory."""
    found: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return found


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
