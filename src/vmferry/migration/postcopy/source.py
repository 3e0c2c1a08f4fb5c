"""The source of a postcopy migration whose machine is at rest: it runs there at once.

QEMU 7.2 ``migration/migration.c``, ``savevm.c`` and ``ram.c``.  The destination is told to forget
all its memory, gets the devices in one package, and runs; then it asks for the pages that it
misses.  One thread answers and, where nobody asks, sends the rest: a request waits for nothing but
what is in the socket already, and that is kept short.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np

from vmferry.errors import (
    ChannelClosed,
    PeerError,
    PeerSilent,
    Refused,
    StorageError,
    TransportError,
    UsageError,
    VmferryError,
    printable,
)
from vmferry.faults import reach
from vmferry.migration.outgoing import Outgoing
from vmferry.migration.progress import Meter
from vmferry.migration.source import Connect
from vmferry.transports import Channel, RateLimit
from vmferry.units import format_duration
from vmferry.wire.commands import (
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
)
from vmferry.wire.layout import IGNORE_SHARED, RAM_SECTION
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd
from vmferry.wire.reader import VERSIONS
from vmferry.wire.return_path import (
    HavePages,
    Message,
    Pong,
    RequestPages,
    ResumeAck,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)
from vmferry.wire.sections import EndOfStream, Header, SectionFooter, SectionPart, SectionStart

from .left import Block, LazyStore, Left, Run
from .records import ROOM, Records

_LOADED: Final = 3
"""The ping inside the package: its answer says that all devices are loaded."""

_LOOK: Final = 0.1
"""Seconds between two looks at a limit that may have been changed."""

_KEEP: Final = 64 << 10
"""Bytes of the background that may wait in the socket in front of an urgent page."""


class LazyMachine(Outgoing, Protocol):
    """A machine that does not run, and whose memory can be looked up."""

    def memory(self, block: RamBlock) -> LazyStore | None:
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


@dataclass(slots=True)
class Service:
    """What was asked for and how fast it was answered; times in seconds since the connection.

    ``asked`` has block number, unit and time of each page that was asked for and not sent before.
    ``loaded`` is when the destination said that all devices are loaded, after which it runs.
    """

    requests: int = 0
    late: int = 0
    pages: int = 0
    loaded: float | None = None
    asked: list[tuple[int, int, float]] = field(default_factory=list)
    took: list[float] = field(default_factory=list)


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
        self._began = 0.0
        self._cancelled = False
        self._channels: list[Channel] = []
        self._runs = self._options.resume
        self._ram = next(n for n in range(1 << 20) if n not in machine.numbers)
        self._blocks = _blocks(machine, self._options.page_sizes)
        self._left = Left(self._blocks)
        largest = max((block.ram.length for block in self._blocks), default=0)
        most = largest // machine.page_size // 8 + 8
        self._reader = ReturnPathReader(max_bitmap=most)

    @property
    def blocks(self) -> Sequence[Block]:
        """Guest memory, and what of it was sent."""
        return self._blocks

    def expect(self, units: Iterable[tuple[int, int]]) -> None:
        """What the machine is likely to want soon, in order: block numbers and units."""
        self._left.expect(units)

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
        room = max(ROOM, *(block.unit for block in self._blocks))
        self._began = time.perf_counter()
        self._main = self._open(cleanup)
        self._main.keep_little(_KEEP)
        self._records = Records(self._machine.page_size, room)
        self._most = max(room // max(block.unit for block in self._blocks), 1)
        self._urgent, self._urgent_records = self._main, self._records
        if self._options.preempt:
            self._urgent = self._open(cleanup)
            self._urgent_records = Records(self._machine.page_size, room)
        self._meter.start()
        reach("connected")
        self._meter.active(sum(b.ram.length for b in self._blocks), self._machine.page_size)
        if self._options.resume:
            self._resume()
        else:
            self._send(self._opening())
        reach("package-sent")
        self._serve()
        self._finish()

    # What is sent before and behind the pages

    def _opening(self) -> list[bytes]:
        machine, first = self._machine, self._blocks[0]
        sizes = 0
        for block in self._blocks:
            sizes |= block.unit
        listed = [
            RamBlock(b.ram.name, b.ram.length, None if b.unit == mmap.PAGESIZE else b.unit)
            for b in self._blocks
        ]
        package = [
            PostcopyListen().encode(),
            *map(bytes, machine.devices),
            Ping(_LOADED).encode(),
            PostcopyRun().encode(),
        ]
        configuration = machine.configuration
        return [
            Header().encode(),
            configuration.encode() if configuration is not None else b"",
            OpenReturnPath().encode(),
            PostcopyAdvise(sizes, machine.page_size).encode(),
            SectionStart(self._ram, RAM_SECTION, 0, VERSIONS[RAM_SECTION]).encode(),
            RamBlocks(tuple(listed)).encode(),
            *self._section_end(),
            *map(bytes, machine.early),
            # Without any the destination is not ready to place pages.
            RamDiscard(first.ram.name, ((0, first.unit),)).encode(),
            Package(b"".join(package)).encode(),
            SectionPart(self._ram, RAM_SECTION).encode(),
        ]

    def _resume(self) -> None:
        """Hear what arrived, and go on behind it (QEMU 3.0)."""
        self._send([ReceivedBitmap(block.ram.name).encode() for block in self._blocks])
        for block in self._blocks:
            match self._await():
                case HavePages(name, bitmap) if name == block.ram.name:
                    block.have(bitmap, self._machine.page_size)
                case other:
                    raise _unexpected(other, f"the pages of {printable(block.ram.name)}")
        self._send([PostcopyResume().encode()])
        if not isinstance(found := self._await(), ResumeAck):
            raise _unexpected(found, "that the migration is resumed")
        if self.service.loaded is None:
            self.service.loaded = time.perf_counter() - self._began
        self._send([SectionPart(self._ram, RAM_SECTION).encode()])

    def _section_end(self) -> list[bytes]:
        footer = [SectionFooter(self._ram).encode()] if self._machine.footers else []
        return [RamEnd().encode(), *footer]

    def _finish(self) -> None:
        if self._urgent is not self._main:
            self._urgent.send([RamEnd().encode()], self._options.idle)
        self._meter.phase("loading")
        self._send([*self._section_end(), EndOfStream().encode()])
        deadline = None if self._options.answer is None else time.monotonic() + self._options.answer
        while True:
            match self._await(deadline):
                case Shut(0):
                    self._main.end_of_data()
                    return
                case RequestPages():
                    pass  # all data is there, or on its way
                case other:
                    self._hear(other)

    # Serving

    def _serve(self) -> None:
        """Answer requests, and send the rest where there are none."""
        while self.service.loaded is None:
            # Nothing else shall stand in the way of what the devices ask for.
            self._turn(sending=self._left.expects)
        while self._turn(sending=True):
            pass

    def _turn(self, *, sending: bool) -> bool:
        """Do what is to be done next; whether there is more."""
        patience = self._options.idle if sending else self._options.answer
        # The limit is for the background: nobody who asks waits for it.
        due = self.limit.due() if sending else 0.0
        if due:
            patience = min(due, _LOOK)
        readable, writable = self._main.turn(patience, sending=sending and not due)
        if readable:
            self._receive()
            self._answer()
        elif writable:
            return self._send_next()
        elif due:
            pass
        else:
            raise PeerSilent(
                f"waited {format_duration(patience or 0)} for the destination to "
                + ("read on, it did not" if sending else "load the devices, it did not say so")
            )
        return True

    def _answer(self) -> None:
        """Send all that is waited for."""
        while (run := self._left.urgent()) is not None:
            self._send_run(run, self._urgent, self._urgent_records, asked=True)
            self.service.took.append(time.perf_counter() - self._received)

    def _send_next(self) -> bool:
        # What is wanted soon will be asked for even where it is zero.
        soon = self._left.soon(self._most)
        run = soon or self._left.next(self._most)
        if run is None:
            return False
        self.limit.spend(run.count * run.block.unit)
        self._send_run(run, self._main, self._records, asked=soon is not None)
        return True

    def _send_run(self, run: Run, channel: Channel, records: Records, *, asked: bool) -> None:
        parts, pages = records.of(run, asked=asked)
        if not parts:
            return
        channel.send(parts, self._options.idle)
        self.service.pages += pages
        self._meter.count(transferred=sum(map(len, parts)), normal=pages)
        self._meter.tick()

    # Bytes and answers

    def _send(self, parts: Sequence[bytes]) -> None:
        self._main.send([part for part in parts if part], self._options.idle)
        self._meter.count(transferred=sum(map(len, parts)))

    def _receive(self) -> None:
        buffer = self._reader.buffer
        buffer.received(self._main.recv_into(buffer.room(), self._options.idle))
        self._received = time.perf_counter()
        for message in self._reader.events():
            self._hear(message)
        if buffer.ended:
            raise self._gone()

    def _hear(self, message: Message) -> None:
        service = self.service
        match message:
            case RequestPages(start, length, block):
                service.requests += 1
                asked = self._left.ask(block, start, length)
                at = time.perf_counter() - self._began
                service.late += not asked
                service.asked += [(number, unit, at) for number, unit in asked]
            case Pong(value) if value == _LOADED:
                service.loaded = time.perf_counter() - self._began
                self._runs = True
                self._meter.phase("postcopy-active")
                reach("loaded-heard")
            case Pong() | SwitchoverAck():
                pass
            case Shut():
                raise Refused("the destination gave the machine up; its own messages say why")
            case other:
                raise _unexpected(other, "a request for pages")

    def _await(self, deadline: float | None = None) -> Message:
        """The next message but pongs; requests are heard as well."""
        buffer = self._reader.buffer
        while True:
            for message in self._reader.events():
                return message
            if buffer.ended:
                raise self._gone()
            left = self._options.answer if deadline is None else deadline - time.monotonic()
            buffer.received(self._main.recv_into(buffer.room(), left and max(left, 0.001)))

    def _gone(self) -> VmferryError:
        if self._runs:
            return TransportError("the destination closed the connection before it had everything")
        return PeerError(
            "the destination closed the connection before it ran the machine; its own messages say"
            " why: is it the same machine, with the capability postcopy-ram?"
        )


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


def _unexpected(found: Message, expected: str) -> PeerError:
    return PeerError(f"expected {expected} from the destination, found {type(found).__name__}")


def quantiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile, 0 where there is nothing."""
    if not seconds:
        return 0.0, 0.0
    median, most = np.quantile(np.asarray(seconds), [0.5, 0.99])
    return float(median), float(most)
