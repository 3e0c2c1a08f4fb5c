"""What of a machine's memory is still to be sent, and in which order.

Every page may be sent once and only once: to the destination a second copy is an error (QEMU 7.2
``migration/postcopy-ram.c``, ``EEXIST`` of ``UFFDIO_COPY``).  So whoever sends one asks here first.
A *unit* is a host page of the destination: what it places at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.errors import StreamError, UsageError, printable
from vmferry.wire.ram import RamBlock

Flags = npt.NDArray[np.bool_]

_MAX_URGENT: Final = 1 << 16
"""Requests that may wait: more than a machine can have threads that wait for a page."""


class LazyStore(Protocol):
    """Memory of which not all has to be looked at."""

    def read(self, offset: int, *buffers: memoryview) -> None:
        """Fill *buffers*, one behind the other, with the bytes from *offset* on."""

    def data_from(self, offset: int) -> tuple[int, int] | None:
        """The first stretch from *offset* on that may hold anything, as bytes from and to."""


@dataclass(slots=True)
class Block:
    """A RAM block; ``unit`` in bytes.

    ``sent`` has a flag for each unit that was sent, ``passed`` for those that need not be, unless
    they are asked for.
    """

    ram: RamBlock
    store: LazyStore
    unit: int
    sent: Flags = field(init=False)
    passed: Flags = field(init=False)
    stretch: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.ram.length % self.unit:
            raise UsageError(
                f"RAM block {printable(self.ram.name)} of {self.ram.length} bytes does not consist"
                f" of pages of {self.unit} bytes"
            )
        self.sent = np.zeros(self.ram.length // self.unit, np.bool_)
        self.passed = np.zeros_like(self.sent)

    def data_from(self, unit: int) -> tuple[int, int] | None:
        """The first stretch from *unit* on that may hold anything, in units."""
        first, last = self.stretch
        # Finding the end of a long one takes the file system milliseconds.
        if not first <= unit < last:
            found = self.store.data_from(unit * self.unit)
            if found is None:
                return None
            first, last = self.stretch = found[0] // self.unit, -(-found[1] // self.unit)
        return max(first, unit), last

    def have(self, bitmap: bytes, page_size: int) -> None:
        """Take note of what arrived: a bit for each target page, as in a recovery.

        Raises :class:`StreamError` where the bitmap is too short.
        """
        pages = self.ram.length // page_size
        bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[:pages]
        if len(bits) < pages:
            raise StreamError(f"a bitmap of {pages} pages", str(len(bits)), block=self.ram.name)
        self.sent = np.asarray(bits.reshape(len(self.sent), -1).all(axis=1))


@dataclass(frozen=True, slots=True)
class Run:
    """Some units of a block, one behind the other."""

    block: Block
    first: int
    count: int


class Left:
    """All that is left to send."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._by_name = {block.ram.name: number for number, block in enumerate(blocks)}
        self._urgent: deque[tuple[Block, int]] = deque()
        self._first: deque[tuple[int, int]] = deque()
        self._last_named: int | None = None
        # The background goes round, and on from where the last request was.
        self._at = 0
        self._unit = 0

    def expect(self, units: Iterable[tuple[int, int]]) -> None:
        """The machine is likely to want these soon: block numbers and units, in order."""
        self._first.extend(units)

    def ask(self, name: str | None, start: int, length: int) -> list[tuple[int, int]]:
        """A request of the destination; the block numbers and units that it is about.

        Raises :class:`StreamError` where there is no such memory.
        """
        number = self._last_named if name is None else self._by_name.get(name)
        if number is None:
            what = "no block yet" if name is None else printable(name)
            raise StreamError("a request for a RAM block of this machine", what)
        self._last_named = number
        block = self._blocks[number]
        if start % block.unit or length % block.unit or start + length > block.ram.length:
            raise StreamError(
                f"a request for pages of {block.unit} bytes below {block.ram.length:#x}",
                f"{length:#x} bytes from {start:#x}",
                block=block.ram.name,
            )
        if length // block.unit > _MAX_URGENT:
            raise StreamError(f"a request for at most {_MAX_URGENT} pages", str(length))
        units = range(start // block.unit, (start + length) // block.unit)
        asked = [(number, unit) for unit in units if not block.sent[unit]]
        if len(self._urgent) + len(asked) > _MAX_URGENT:
            raise StreamError(f"at most {_MAX_URGENT} pages that are waited for", "more")
        self._urgent.extend((block, unit) for _, unit in asked)
        self._at, self._unit = number, units.stop
        return asked

    @property
    def remaining(self) -> int:
        """Bytes that were not sent, of memory that may hold anything.  Looks at all of it."""
        total = 0
        for block in self._blocks:
            unit = 0
            while (found := block.data_from(unit)) is not None:
                start, unit = found
                total += int(np.count_nonzero(~block.sent[start:unit])) * block.unit
        return total

    def again(self) -> None:
        """What was sent did not all arrive, and what did is noted: go over all of it once more."""
        self._urgent.clear()
        self._last_named = None
        self._at = self._unit = 0
        for block in self._blocks:
            block.passed[:] = False

    def urgent(self) -> Run | None:
        """What the destination waits for, one unit at a time."""
        while self._urgent:
            block, unit = self._urgent.popleft()
            if not block.sent[unit]:
                return _claimed(block, unit, 1)
        return None

    @property
    def expects(self) -> bool:
        """Whether there is anything that the machine is likely to want soon."""
        return bool(self._first)

    def soon(self, most: int) -> Run | None:
        """The next that is likely to be wanted; units that follow each other together."""
        while self._first:
            number, unit = self._first.popleft()
            block = self._blocks[number]
            if block.sent[unit]:
                continue
            count = 1
            while (
                count < most
                and self._first
                and self._first[0] == (number, unit + count)
                and not block.sent[unit + count]
            ):
                self._first.popleft()
                count += 1
            return _claimed(block, unit, count)
        return None

    def next(self, most: int) -> Run | None:
        """Up to *most* units of all the rest; ``None`` where there is no more.

        Memory without data is left out: it is zero at the destination, too.
        """
        # From where it is to the end of the last block, and from the first one to where it was.
        for step in range(len(self._blocks) + 1):
            if step:
                self._at, self._unit = (self._at + 1) % len(self._blocks), 0
            block = self._blocks[self._at]
            if (first := self._next_in(block)) is not None:
                ahead = block.passed[first : first + most] | block.sent[first : first + most]
                count = int(ahead.argmax()) if ahead.any() else len(ahead)
                self._unit = first + count
                block.passed[first : first + count] = True
                return _claimed(block, first, count)
        return None

    def _next_in(self, block: Block) -> int | None:
        """The first unit of a block, from where the background is on, that may have to be sent."""
        unit = self._unit
        while (found := block.data_from(unit)) is not None:
            start, end = found
            while start < end:
                done = block.passed[start : min(end, start + _LOOK)]
                done = done | block.sent[start : start + len(done)]
                if not done.all():
                    return start + int(done.argmin())
                start += len(done)
            unit = end
        return None


_LOOK: Final = 1 << 14
"""Units looked at in one go."""


def _claimed(block: Block, first: int, count: int) -> Run:
    block.sent[first : first + count] = True
    return Run(block, first, count)
