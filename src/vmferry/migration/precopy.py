"""What a machine that runs has: all of it once, then what was written meanwhile, in rounds.

QEMU 7.2 ``migration/ram.c``.  The log is started before the first page is read, and a page leaves
the set of dirty ones before it is read, so whatever is written afterwards is found by the next
round, or by the last one, when the machine has been stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.memory import PAGE_SIZE, DirtyLog, MemoryBlock
from vmferry.memory.bits import get_bits
from vmferry.pages import (
    XbzrleCache,
    count_pages,
    gather_pages,
    pack_pages,
    pack_pages_xbzrle,
    set_range,
    take_pages,
    zero_pages,
)
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import RamBlock

from .batches import Batch
from .disks import LiveDisks, Record
from .page_sender import PageSender
from .pieces import Pieces
from .registry import Handler
from .statistics import Statistics

Numbers = npt.NDArray[np.uint64]

_ROOM: Final = 1 << 20
"""Bytes of records in a batch: they stay in the second-level cache until they are sent."""

_TAKE: Final = 1 << 12
"""Pages taken from the set of dirty ones at a time."""


@dataclass(slots=True)
class DirtyBlock:
    """A RAM block, its log, and the pages of it that are still to be sent; made behind its start.

    ``content`` is what to send.  ``known`` has a byte for each page, 0 for those that never had
    memory.
    """

    memory: MemoryBlock
    log: DirtyLog
    dirty: Numbers = field(init=False)
    content: memoryview = field(init=False)
    known: npt.NDArray[np.uint8] = field(init=False)
    name: bytes = field(init=False)
    block: RamBlock = field(init=False)

    def __post_init__(self) -> None:
        pages = self.memory.pages
        self.dirty = np.zeros(-(-pages // 64), np.uint64)
        self.content = self.log.content(self.memory)
        self.known = self.memory.populated()
        self.name = encode_name(self.memory.name)
        self.block = RamBlock(self.memory.name, self.memory.size)

    @property
    def file(self) -> int | None:
        """A descriptor that has what to send, unless that is a copy."""
        return self.memory.fd if self.content is self.memory.image else None

    def add_all(self) -> None:
        """Everything is to be sent."""
        set_range(self.dirty, 0, self.memory.pages)

    def collect(self) -> int:
        """Add what was written since the last time; how many pages are to be sent."""
        written = np.zeros_like(self.dirty)
        self.log.collect(self.memory, written)
        self.known |= get_bits(written, self.memory.pages)
        # Beside it there may be pages that were not sent yet, which may have no memory at all.
        self.dirty |= written
        return count_pages(self.dirty)

    def take(self) -> Iterator[Numbers]:
        """Dirty pages, by number and ascending, some at a time, until none is left."""
        out = np.empty(_TAKE, np.uint64)
        at = 0
        while True:
            at, count = take_pages(self.dirty, at, _TAKE, out)
            if not count:
                return
            yield out[:count]

    def give_back(self, numbers: Numbers) -> None:
        """These pages are to be sent after all."""
        bits = np.uint64(1) << (numbers & np.uint64(63))
        np.bitwise_or.at(self.dirty, numbers >> np.uint64(6), bits)


class Lead(Protocol):
    """Who leads the migration: knows the machine, and decides."""

    def begin(self) -> LiveDisks | None:
        """All channels are there; the disks that move along, if any do."""

    def start(self) -> list[DirtyBlock]:
        """Start the log; all that is to be sent."""

    def delta(self) -> XbzrleCache | None:
        """What the destination holds, from the second round on; ``None`` to send pages whole."""

    def moved(self) -> None:
        """Something was sent; called often."""

    def wants_postcopy(self) -> bool:
        """Whether the rest is to follow the machine; asked often."""

    def another(self, remaining: int) -> bool:
        """Whether to send so many bytes that were written while the machine runs on."""

    def stop(self) -> None:
        """Stop the machine."""

    def let_go(self) -> None:
        """Let go of the disks: what was to be read of them has been."""

    def synced(self, remaining: int) -> None:
        """So many bytes are to be sent now."""


class Precopy:
    """Sends the memory and disks of a machine, and what its *handlers* have; a ``Passes``."""

    def __init__(
        self, lead: Lead, handlers: Sequence[Handler], statistics: Statistics, cleanup: ExitStack
    ) -> None:
        self._lead = lead
        self._handlers = handlers
        self._statistics = statistics
        self._cleanup = cleanup
        self._pieces = Pieces((), 0, lambda _: None)
        self._disks: LiveDisks | None = None
        self._blocks: list[DirtyBlock] = []
        self._room = bytearray(_ROOM)
        self._last_block: DirtyBlock | None = None
        self._syncs = 0
        self._is_last = False
        self.switches = False
        """Whether the rest of memory is to follow the machine, by postcopy."""

    def start(self) -> bool:
        """See :class:`~.passes.Passes`."""
        self._disks = self._lead.begin()
        return bool(self._disks)

    def begin(self, write: Callable[[bytes], object]) -> None:
        """Begin the sections of the machine's own handlers."""
        self._pieces = Pieces(self._handlers, 0, write)
        self._pieces.setup(self._cleanup)

    def chunks(self) -> Iterator[Record]:
        """See :class:`~.passes.Passes`."""
        for record in self._disks.chunks() if self._disks is not None else ():
            yield record
            self._lead.moved()

    def parts(self, pages: PageSender | None) -> Iterator[Iterator[Batch]]:
        """A section for each round."""
        self._blocks = self._lead.start()
        for block in self._blocks:
            block.add_all()
        self._lead.synced(sum(block.memory.size for block in self._blocks))
        going_on = True
        while going_on:
            yield self._round(pages, None if self._syncs == 0 else self._lead.delta())
            self._pieces.iterate()
            if self._lead.wants_postcopy():
                break
            remaining = self._collect() + self._pieces.pending()
            if self._disks is not None:
                remaining += self._disks.remaining
            going_on = self._lead.another(remaining) and not self._lead.wants_postcopy()
        self.switches = self._lead.wants_postcopy()

    def stop(self) -> None:
        """Stop the machine."""
        self._lead.stop()

    def rest(self, pages: PageSender | None) -> Iterator[Batch]:
        """Let go of its disks, and send what it wrote last."""
        self._lead.let_go()
        self._collect()
        self._is_last = True
        return self._round(pages, self._lead.delta())

    def look(self) -> list[DirtyBlock]:
        """Memory, with what of it has not come to the destination, while the machine runs."""
        self._collect()
        return self._blocks

    def switch(self) -> list[DirtyBlock]:
        """Stop the machine; memory, with what of it has not come to the destination."""
        self._lead.stop()
        self._lead.let_go()
        self._collect()
        return self._blocks

    def end(self) -> None:
        """Write what is left of the handlers' sections."""
        self._pieces.complete()

    def done(self) -> None:
        """The downtime is over."""
        self._statistics.finished()

    def _collect(self) -> int:
        """Find what was written; how many bytes are to be sent now."""
        remaining = sum(block.collect() for block in self._blocks) * PAGE_SIZE
        self._syncs += 1
        self._lead.synced(remaining)
        return remaining

    def _round(self, pages: PageSender | None, delta: XbzrleCache | None) -> Iterator[Batch]:
        base = 0
        for block in self._blocks:
            for numbers in block.take():
                if pages is not None:
                    yield from self._pack(block, _hand_over(pages, block, numbers))
                elif delta is not None:
                    yield from self._pack_delta(delta, block, numbers, base)
                else:
                    yield from self._pack(block, numbers)
                self._lead.moved()
                if not self._is_last and self._lead.wants_postcopy():
                    return
            base += block.memory.pages

    def _pack(self, block: DirtyBlock, numbers: Numbers) -> Iterator[Batch]:
        """Records of pages, for the main channel."""
        first = 0
        while first < len(numbers):
            named, self._last_block = block is not self._last_block, block
            following, used, zero = pack_pages(
                block.content,
                numbers,
                first,
                PAGE_SIZE,
                block.name,
                named,
                self._room,
                block.known,
            )
            yield Batch(memoryview(self._room)[:used], following - first - zero, zero)
            first = following
            if self._follows(block, numbers[first:]):
                return

    def _pack_delta(
        self, cache: XbzrleCache, block: DirtyBlock, numbers: Numbers, base: int
    ) -> Iterator[Batch]:
        """As :meth:`_pack`, for pages that the destination may have in an older state."""
        first = 0
        while first < len(numbers):
            packed = pack_pages_xbzrle(
                cache,
                block.content,
                numbers,
                first,
                PAGE_SIZE,
                block.name,
                block is not self._last_block,
                base,
                self._syncs,
                self._is_last,
                self._room,
            )
            first = packed.following
            self._statistics.count(
                xbzrle_pages=packed.pages,
                xbzrle_bytes=packed.bytes,
                xbzrle_misses=packed.cache_miss,
                xbzrle_overflows=packed.overflow,
            )
            if packed.size:
                self._last_block = block
                yield Batch(memoryview(self._room)[: packed.size], packed.normal, packed.zeros)
            if self._follows(block, numbers[first:]):
                return

    def _follows(self, block: DirtyBlock, rest: Numbers) -> bool:
        """Whether the rest of memory is to follow the machine: then this *rest* does too."""
        if self._is_last or not self._lead.wants_postcopy():
            return False
        block.give_back(rest)
        return True


def _hand_over(pages: PageSender, block: DirtyBlock, numbers: Numbers) -> Numbers:
    """Send the pages that have content over multifd; returns the others."""
    zero = np.empty(len(numbers), np.uint8)
    count = zero_pages(block.content, numbers, PAGE_SIZE, zero, block.known)
    if count < len(numbers):
        full = numbers[zero == 0]
        pages.send(block.block, full, partial(_content, block.content), block.file)
    rest: Numbers = numbers[zero != 0]
    return rest


def _content(memory: memoryview, pages: Numbers, buffer: memoryview) -> memoryview:
    first, count = int(pages[0]), len(pages)
    if int(pages[-1]) - first + 1 == count:
        # What is written while it is being sent is sent again, so no copy has to be made.
        return memory[first * PAGE_SIZE : (first + count) * PAGE_SIZE]
    return buffer[: gather_pages(memory, pages, PAGE_SIZE, buffer)]
