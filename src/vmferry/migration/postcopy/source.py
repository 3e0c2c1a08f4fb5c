"""The source of a postcopy migration whose machine is at rest: it runs there at once.

QEMU 7.2 ``migration/migration.c`` and ``savevm.c``.  The destination is told to forget all its
memory, gets the devices in one package, and runs; then it asks for the pages that it misses.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vmferry.errors import (
    ChannelClosed,
    StorageError,
    TransportError,
    UsageError,
    printable,
)
from vmferry.faults import reach
from vmferry.migration.outgoing import Outgoing, PageStore
from vmferry.migration.progress import Meter
from vmferry.migration.source import Connect
from vmferry.transports import Channel, RateLimit
from vmferry.wire.commands import (
    OpenReturnPath,
    PostcopyAdvise,
    RamDiscard,
)
from vmferry.wire.layout import IGNORE_SHARED, RAM_SECTION
from vmferry.wire.ram import RamBlock, RamBlocks
from vmferry.wire.reader import VERSIONS
from vmferry.wire.sections import Header, SectionStart

from .left import Block, LazyStore
from .server import MemoryServer, RamFormat, Service, package_of


class StoredMemory(PageStore, LazyStore, Protocol):
    """The content of a RAM block that is stored, and where it has any."""


class LazyMachine(Outgoing, Protocol):
    """A machine that does not run, and whose memory can be looked up."""

    def memory(self, block: RamBlock) -> StoredMemory | None:
        """The content of a block; ``None`` where both sides share it."""


@dataclass(frozen=True, slots=True)
class LazyOptions:
    """How to serve.

    ``preempt`` opens a second channel for what is urgent, as a destination with the capability
    ``postcopy-preempt`` expects.  ``page_sizes`` has the destination's page size in bytes for
    blocks in huge pages.  ``bandwidth`` bounds the background, in bytes a second.  ``idle`` is how
    many seconds the destination may read nothing while there is something, ``answer`` how many it
    may take to load the devices, and to end.  ``resume``: the destination runs the machine already,
    and its migration is paused.
    """

    preempt: bool = False
    page_sizes: Mapping[str, int] = field(default_factory=dict)
    bandwidth: float | None = None
    idle: float | None = 60.0
    answer: float | None = 60.0
    resume: bool = False


class Paused(TransportError):
    """The connection is lost, and the machine runs at the destination: it waits for the rest."""


class LazySource:
    """Lets *machine* run at the destination, and sends its memory as it is asked for it."""

    def __init__(
        self,
        machine: LazyMachine,
        connect: Connect,
        *,
        options: LazyOptions | None = None,
        meter: Meter | None = None,
        service: Service | None = None,
    ) -> None:
        self._machine = machine
        self._connect = connect
        self._options = options or LazyOptions()
        self._meter = meter or Meter()
        self.limit = RateLimit(self._options.bandwidth)
        self.service = service or Service()
        self._cancelled = False
        self._channels: list[Channel] = []
        self._runs = self._options.resume
        self._blocks = _blocks(machine, self._options.page_sizes)
        number = next(n for n in range(1 << 20) if n not in machine.numbers)
        self._ram = RamFormat(number, machine.page_size, machine.footers)
        self._server = MemoryServer(
            self._blocks,
            self._ram,
            idle=self._options.idle,
            answer=self._options.answer,
            limit=self.limit,
            meter=self._meter,
            service=self.service,
            loaded=self._loaded,
        )

    @property
    def blocks(self) -> Sequence[Block]:
        """Guest memory, and what of it was sent."""
        return self._blocks

    def expect(self, units: Iterable[tuple[int, int]]) -> None:
        """What the machine is likely to want soon, in order: block numbers and units."""
        self._server.left.expect(units)

    def run(self) -> None:
        """Serve until the destination has all.

        Raises :class:`Paused` where the connection is lost after it runs: another source with the
        option ``resume`` can go on.  Before that it does not run, and anything else is raised.
        """
        try:
            with ExitStack() as cleanup:
                self._run(cleanup)
        except BaseException as error:
            self._meter.phase("failed")
            if self._runs and isinstance(error, (TransportError, StorageError)):
                raise Paused(
                    f"{error}; the machine runs at the destination and waits for memory that it"
                    " does not have: have it listen again (migrate-recover), and resume"
                ) from error
            raise
        self._meter.phase("completed")

    def cancel(self) -> bool:
        """Give up, from any thread: :meth:`run` raises :class:`ChannelClosed`."""
        self._cancelled = True
        self.limit.shutdown()
        for channel in list(self._channels):
            channel.shutdown()
        return True

    def _open(self, cleanup: ExitStack) -> Channel:
        channel = cleanup.enter_context(self._connect(lambda: self._cancelled))
        self._channels.append(channel)
        if self._cancelled:
            raise ChannelClosed("the migration was cancelled on this side")
        if not channel.duplex:
            raise UsageError(
                f"{printable(channel.name)}: expected a connection that the destination can answer"
                " on: tcp:, unix:, or fd: with a socket"
            )
        return channel

    def _run(self, cleanup: ExitStack) -> None:
        server = self._server
        main = self._open(cleanup)
        server.attach(main, self._open(cleanup) if self._options.preempt else None)
        self._meter.start()
        reach("connected")
        self._meter.active(sum(b.ram.length for b in self._blocks), self._machine.page_size)
        if self._options.resume:
            server.resume()
            server.begin()
        else:
            server.begin(*self._opening())
        reach("package-sent")
        server.await_loaded()
        server.serve()
        self._meter.phase("loading")
        server.finish()

    def _loaded(self) -> None:
        self._runs = True
        self._meter.phase("postcopy-active")

    def _opening(self) -> list[bytes]:
        machine, first = self._machine, self._blocks[0]
        sizes = 0
        for block in self._blocks:
            sizes |= block.unit
        listed = [
            RamBlock(b.ram.name, b.ram.length, None if b.unit == mmap.PAGESIZE else b.unit)
            for b in self._blocks
        ]
        configuration = machine.configuration
        return [
            Header().encode(),
            configuration.encode() if configuration is not None else b"",
            OpenReturnPath().encode(),
            PostcopyAdvise(sizes, machine.page_size).encode(),
            SectionStart(self._ram.number, RAM_SECTION, 0, VERSIONS[RAM_SECTION]).encode(),
            RamBlocks(tuple(listed)).encode(),
            *self._ram.end_of_part(),
            *map(bytes, machine.early),
            # Without any the destination is not ready to place pages.
            RamDiscard(first.ram.name, ((0, first.unit),)).encode(),
            package_of(machine.devices),
        ]


def _blocks(machine: LazyMachine, page_sizes: Mapping[str, int]) -> list[Block]:
    configuration = machine.configuration
    if configuration is not None and IGNORE_SHARED in configuration.capabilities:
        raise UsageError("a machine whose memory is shared (x-ignore-shared) has none to fetch")
    if machine.disks or any(True for _ in machine.bitmaps):
        raise UsageError(
            "the checkpoint carries disks or dirty bitmaps, which cannot be fetched later: use"
            " vmferry send"
        )
    blocks = []
    for ram in machine.blocks:
        store = machine.memory(ram)
        if store is None:
            raise UsageError(f"the checkpoint has no content of RAM block {printable(ram.name)}")
        unit = page_sizes.get(ram.name, max(machine.page_size, mmap.PAGESIZE))
        blocks.append(Block(ram, store, unit))
    if not blocks:
        raise UsageError("the checkpoint has no guest memory to fetch")
    return blocks


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, 0 where there is nothing."""
    if not seconds:
        return 0.0, 0.0
    median, most = np.quantile(np.asarray(seconds), [0.5, 0.99])
    return float(median), float(most)
