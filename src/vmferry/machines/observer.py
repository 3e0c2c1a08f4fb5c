"""The memory of a paused guest, seen from outside: every byte is as it must be, or is named.

What a page has to hold follows from its number and from the counters of the vCPU that walks over
it (:mod:`.guest.pages`), so every byte of the working set is known.  Only the page that a vCPU is
at may be half written, and then the new words are the first ones, in the order of writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.memory import GuestMemory, MemoryBlock

from .config import PAGE, MachineConfig
from .guest.console import Report
from .guest.layout import BLOCK, BLOCKS, Layout
from .guest.pages import (
    MAGIC,
    NUMBER,
    ORDER,
    SEQUENCE,
    SUM,
    SUM_OF_SUMS,
    WORDS,
    Words,
    content_sums,
    written,
)
from .guest.program import changed_lines, constants

RAM: Final = "ram"

_BATCH: Final = 128
_MOST: Final = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, and where in RAM."""

    offset: int
    text: str

    def __str__(self) -> str:
        return f"{self.offset:#x}: {self.text}"


@dataclass(frozen=True, slots=True)
class _Walk:
    """A range of pages that one vCPU goes over again and again, and how far it got."""

    first: int
    count: int
    steps: int
    vcpu: int
    repeated: bool  # it writes them each time, not only the first time

    def sequences(self, numbers: Words) -> Words:
        """The sequence numbers that pages of the walk should have."""
        walks, position = divmod(self.steps, self.count)
        if walks and not self.repeated:
            return np.ones_like(numbers)
        behind = numbers < np.uint64(self.first + position)
        return np.where(behind, np.uint64(walks + 1), np.uint64(walks))

    @property
    def current(self) -> int | None:
        """The page that is written next, or was begun; ``None`` if none is."""
        walks, position = divmod(self.steps, self.count)
        return self.first + position if self.repeated or not walks else None


def check(memory: GuestMemory, config: MachineConfig) -> list[Finding]:
    """What is wrong in the memory of a paused machine; nothing if all is right, 100 at the most."""
    block = memory[RAM]
    layout = Layout.of(config)
    if block.size != config.ram:
        return [Finding(0, f"expected {config.ram} bytes of RAM, found {block.size}")]
    found: list[Finding] = []
    for findings in (
        _constants(block, config),
        _blocks(block, layout),
        _pages(block, layout, changed_lines(config.guest.changed)),
        _rest(block, config),
    ):
        for finding in findings:
            found.append(finding)
            if len(found) == _MOST:
                return found
    return found


def _constants(block: MemoryBlock, config: MachineConfig) -> Iterator[Finding]:
    for start, part in constants(config).items():
        wrong = np.flatnonzero(block.array[start : start + len(part)] != part)
        if len(wrong):
            yield Finding(
                start + int(wrong[0]), f"{len(wrong)} bytes differ from what the board wrote"
            )


def _counters(block: MemoryBlock, layout: Layout) -> npt.NDArray[np.void]:
    """The blocks of all vCPUs."""
    raw = block.array[BLOCKS : BLOCKS + layout.cpus * PAGE].reshape(-1, PAGE)
    return raw[:, : BLOCK.itemsize].copy().view(BLOCK)[:, 0]


def _blocks(block: MemoryBlock, layout: Layout) -> Iterator[Finding]:
    for index, counters in enumerate(_counters(block, layout)):
        if counters["kind"]:
            values = (int(counters[name]) for name in ("kind", "page", "expected", "found"))
            yield Finding(layout.block(index), f"the guest found: {Report(index, *values)}")


def _walks(block: MemoryBlock, layout: Layout) -> Iterator[_Walk]:
    for index, counters in enumerate(_counters(block, layout)):
        share = layout.share(index)
        hot, cold = int(counters["hot_steps"]), int(counters["cold_steps"])
        if share.hot_count:
            yield _Walk(share.hot_first, share.hot_count, hot, index, repeated=True)
        if share.cold_count:
            yield _Walk(share.cold_first, share.cold_count, cold, index, repeated=False)


def _pages(block: MemoryBlock, layout: Layout, changed: int) -> Iterator[Finding]:
    for walk in _walks(block, layout):
        for first in range(walk.first, walk.first + walk.count, _BATCH):
            end = min(first + _BATCH, walk.first + walk.count)
            yield from _batch(block, layout, changed, walk, range(first, end))


def _batch(
    block: MemoryBlock, layout: Layout, changed: int, walk: _Walk, pages: range
) -> Iterator[Finding]:
    start = layout.base + pages.start * PAGE
    found = block.array[start : start + len(pages) * PAGE].view("<u8").reshape(-1, WORDS)
    numbers = np.arange(pages.start, pages.stop, dtype=np.uint64)
    sequences = walk.sequences(numbers)
    writers = np.full_like(numbers, walk.vcpu)
    expected = written(numbers, sequences, changed, writers)
    for row in np.flatnonzero((found != expected).any(axis=1)):
        if pages.start + row == walk.current:
            one = slice(row, row + 1)
            following = written(numbers[one], sequences[one] + np.uint64(1), changed, writers[one])
            if _half_written(found[row], expected[row], following[0]):
                continue
        text = _difference(found[row], expected[row])
        yield Finding(start + int(row) * PAGE, f"page {pages.start + row} {text}")


def _half_written(found: Words, old: Words, new: Words) -> bool:
    """Whether the first words of the page, in the order of writing, are new and the others old."""
    found, old, new = found[ORDER], old[ORDER], new[ORDER]
    behind = np.flatnonzero(found != new)
    first = int(behind[0]) if len(behind) else WORDS
    return bool((found[first:] == old[first:]).all())


def _difference(found: Words, expected: Words) -> str:
    """What is wrong with a page, in words."""
    if not found.any():
        return f"is lost: expected sequence {expected[SEQUENCE]}, found zeros"
    if not expected.any():
        return "was never written: expected zeros, found something"
    if found[0] != MAGIC or found[NUMBER] != expected[NUMBER]:
        return f"is lost: expected page {expected[NUMBER]}, found {found[0]:#x}, {found[NUMBER]}"
    total, totals = (int(values[0]) for values in content_sums(found[None]))
    if (total, totals) != (int(found[SUM]), int(found[SUM_OF_SUMS])):
        at = int(np.flatnonzero(found != expected)[0]) * 8
        return (
            f"is torn, from byte {at} on: expected sums {total:#x} and {totals:#x} of its content, "
            f"found {found[SUM]:#x} and {found[SUM_OF_SUMS]:#x}"
        )
    if found[SEQUENCE] != expected[SEQUENCE]:
        return f"is stale: expected sequence {expected[SEQUENCE]}, found {found[SEQUENCE]}"
    return "holds what the guest never wrote, with sums that fit"


def _rest(block: MemoryBlock, config: MachineConfig) -> Iterator[Finding]:
    """What should be zero, where there is memory at all."""
    end = 0
    for start, part in sorted(constants(config).items()):
        if start <= BLOCKS:
            yield from _zero(block, end, start)
            end = start + len(part)
    yield from _zero(block, Layout.of(config).end, block.size)


def _zero(block: MemoryBlock, start: int, end: int) -> Iterator[Finding]:
    while (start := block.next_populated(start)) < end:
        stop = min(os.lseek(block.fd, start, os.SEEK_HOLE), start + _BATCH * PAGE, end)
        part = block.array[start:stop]
        if part.any():
            at = start + int(np.flatnonzero(part)[0])
            yield Finding(at, "expected zeros outside the working set, found something")
        start = stop
