"""The source of a precopy migration: what it sends, in which order, and what it waits for.

QEMU 7.2 ``migration/migration.c`` and ``migration/savevm.c``.  With a return path the machine is
the destination's once it has said so, and not before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias
from uuid import UUID

from vmferry.errors import (
    ChannelClosed,
    CommandFailed,
    InDoubt,
    PeerError,
    Refused,
    StorageError,
    TransportError,
    UsageError,
    VmferryError,
)
from vmferry.faults import reach
from vmferry.ownership.engine import Ownership
from vmferry.ownership.identity import Identity
from vmferry.transports import Buffer, Channel, RateLimit, limited
from vmferry.wire.bitmap import BitmapsEnd, BitmapStart
from vmferry.wire.commands import OpenReturnPath, Ping, PostcopyAdvise
from vmferry.wire.description import parse_description
from vmferry.wire.disk import DiskChunk, DiskEnd, DiskProgress
from vmferry.wire.layout import (
    BITMAP_SECTION,
    DISK_SECTION,
    RAM_SECTION,
    Kind,
)
from vmferry.wire.machine import machine_version
from vmferry.wire.multifd import READABLE, Method
from vmferry.wire.ram import RamBlocks, RamEnd, RamFlush
from vmferry.wire.reader import VERSIONS
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

from .batches import Batch
from .handover import SOURCE, SOURCE_OF_QEMU, Handover, Stage, Word
from .outgoing import Outgoing
from .page_sender import PageSender
from .passes import OnePass, Passes
from .postcopy.server import RamFormat
from .postcopy.way import Follower, Way
from .progress import Meter
from .takeover import CHANNELS, GO, GRANTED, OWNED, announcement, has_died, keeping_the_machine
from .verdict import Verdict

_FLUSHES_SINCE: Final = (8, 1)
"""Machine types from this version on synchronise multifd by a record, not at each section's end."""

_CANCELLED: Final = "the migration was cancelled on this side"

_KEPT: Final = (
    "it stays stopped here until an operator who knows that it does not run there starts it"
)

_SWITCHING: Final = 2
"""A ping, as QEMU numbers them, before memory follows the machine."""

_LOOKS: Final = 5
"""How often what was written meanwhile is looked for before the machine is stopped: each time it is
what was written while the destination forgot that of the time before."""

_NOBODY: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class SendOptions:
    """How to send: ``multifd`` channels (0 for none), their compression, and the limits.

    ``postcopy`` announces that memory may follow the machine, ``preempt`` opens a channel of its
    own for what is urgent then.  ``return_path`` is whether to ask for the destination's word,
    where the transport can carry it.  ``bandwidth`` in bytes per second over all channels, ``None``
    without limit.  ``idle`` is how many seconds the destination may read nothing while there is
    something to read, ``answer`` how many it may take to load what it was sent; ``None`` is for
    ever.
    """

    multifd: int = 0
    postcopy: bool = False
    preempt: bool = False
    method: Method = Method.NONE
    level: int = 1
    return_path: bool = True
    bandwidth: float | None = None
    idle: float | None = 60.0
    answer: float | None = 60.0


Connect: TypeAlias = Callable[[Callable[[], bool]], Channel]
"""Opens one more connection, unless what it is given says meanwhile that none is wanted."""


class Encodes(Protocol):
    """An event that knows its bytes."""

    def encode(self) -> bytes | memoryview:
        """The event as on the wire."""


class Head(Encodes, Protocol):
    """What opens a section."""

    @property
    def number(self) -> int:
        """The section's number."""


class Source:
    """Sends *machine*; *connect* opens one more connection to the destination.

    *passes* is the memory of a machine that still runs; then the machine is handed over as in
    :mod:`.handover`, where the transport has a way back.  *follower* goes on where *passes*
    switches to postcopy.  *ownership* is the record of who owns it, if it has one; where something
    fails, :meth:`Ownership.undo` is the caller's.
    """

    def __init__(
        self,
        machine: Outgoing,
        connect: Connect,
        *,
        options: SendOptions | None = None,
        meter: Meter | None = None,
        passes: Passes | None = None,
        follower: Follower | None = None,
        ownership: Ownership | None = None,
    ) -> None:
        self._machine = machine
        self._ownership = ownership
        self._passes = passes
        self._follower = follower
        self._connect = connect
        self._options = options or SendOptions()
        self._meter = meter or Meter()
        self.limit = RateLimit(self._options.bandwidth)
        self._pages: PageSender | None = None
        self._channels: list[Channel] = []
        self._cancelled = False
        self._broken_off = False
        self.handover = Handover(SOURCE)
        self.has_switched = False
        """Whether memory follows the machine, by postcopy."""
        self._has_ended = False
        taken = machine.numbers
        free = (number for number in range(1 << 20) if number not in taken)
        self._disk, self._ram, self._bitmap = (next(free) for _ in range(3))
        self._flushes = _flushes_by_record(machine)
        if not 0 <= self._options.multifd <= 255:
            raise UsageError(f"multifd takes 1 to 255 channels, not {self._options.multifd}")
        if self._options.method != Method.NONE and not self._options.multifd:
            raise UsageError("compression needs multifd channels (--multifd N)")
        if self._options.method not in READABLE:
            method = self._options.method.name.lower()
            raise UsageError(f"pages can be compressed with zlib or zstd, not with {method}")

    def run(self) -> None:
        """Send everything and hear that it was loaded, where the transport has a way back."""
        try:
            self._run()
        except BaseException:
            if not self.is_over:
                self._meter.phase("failed")
            raise
        self._meter.phase("completed" if self._answered else "sent")

    @property
    def is_over(self) -> bool:
        """Whether all was sent, and loaded if that can be known: no failure takes that back."""
        return self._has_ended or self.handover.stage == Stage.RELEASED

    def _run(self) -> None:
        # What waits for the end of a channel, and the channels.
        with ExitStack() as outlast, ExitStack() as cleanup:
            self._cleanup = cleanup
            main = self._main = self._open(cleanup)
            self._answered = main.duplex and self._options.return_path
            if not self._answered:
                if self._ownership is not None:
                    raise UsageError(
                        "a machine with a record of who owns it is given away only where the other"
                        " side can answer: use tcp: or unix:, and return-path"
                    )
                self.handover = Handover(SOURCE_OF_QEMU)
            verdict = self._verdict = Verdict(
                main, lambda: self.handover.stage == Stage.RESUMED, self._break_off
            )
            if self._answered:
                outlast.callback(verdict.join)
                verdict.listen()
            self._meter.start()
            reach("connected")
            try:
                self._send_all(cleanup)
                if not self.has_switched:
                    if self._answered:
                        self._conclude()
                    main.end_of_data()
                self._has_ended = True
            except BaseException as error:
                refusal = None
                if isinstance(error, TransportError) and self._answered and not self._cancelled:
                    refusal = verdict.refusal()
                if not self._answered:
                    self._hear_of_failure(error)
                self.handover.hear(Word.LOST)
                # No thread shall wait for a channel that nobody reads any more.
                for channel in self._channels:
                    channel.shutdown()
                if refusal is not None:
                    raise refusal from None
                if not self._answered and self.handover.stage == Stage.UNKNOWN:
                    raise InDoubt(
                        f"all was sent, and nobody knows whether it has arrived ({error}); {_KEPT}"
                    ) from error
                raise

    def _hear_of_failure(self, error: BaseException) -> None:
        """Nobody answers, but what cannot be written, or a command that fails, is an answer too."""
        if isinstance(error, StorageError | CommandFailed):
            self.handover.hear(Word.REFUSED)

    def _conclude(self) -> None:
        """Everything is sent: hear that it is loaded, and let go of a machine that ran."""
        patience = self._options.answer
        self._meter.phase("loading")
        if self._passes is None:
            return self._verdict.await_success(patience)
        with keeping_the_machine(self._main):
            reach("offered")
            ready = self._verdict.await_ready(patience)
            reach("ready-heard")
            if self._ownership is not None:
                if ready is None:
                    raise PeerError("the destination heeds no record of who owns the machine")
                self._ownership.grant(self.is_off)
            if not self.handover.hear(Word.READY):
                raise ChannelClosed(_CANCELLED)
        if ready is not None:
            self._let_go(ready)
        self.handover.hear(Word.SHUT)
        self._passes.done()
        if self._ownership is not None:
            self._ownership.given()
        reach("shut-heard")
        return None

    def _let_go(self, destination: Identity) -> None:
        """Say *go*; from here on only the destination's own word brings the machine back."""
        self._meter.phase("handing-over")
        try:
            go = GO if self._ownership is None else GRANTED
            self._main.send([Ping(go).encode()], self._options.idle)
            reach("go-said")
            return self._verdict.await_success(self._options.answer)
        except Refused:
            self.handover.hear(Word.REFUSED)
            raise
        except VmferryError as failure:
            error = failure
        if self._ownership is not None:
            self.handover.hear(Word.LOST)
            raise error  # the record says whose it is
        if has_died(self._main, destination):
            if self._verdict.is_success():
                return None
            self.handover.hear(Word.GONE)
            raise PeerError("the destination died before it took the machine") from error
        self.handover.hear(Word.LOST)
        raise InDoubt(
            f"the destination was given the machine and did not say that it runs it ({error});"
            f" {_KEPT}"
        ) from error

    def linger(self) -> None:
        """Between two sections, say that more will come, and raise where nobody waits for it."""
        if self._answered:
            self._verdict.check()
            self._send(Ping(1))

    def cancel(self) -> bool:
        """Give up, from any thread: :meth:`run` raises :class:`~vmferry.errors.ChannelClosed`.

        False where it is too late: a running machine
        was handed over.  That of a machine at rest the destination may have already in the phase
        ``loading``, and this side does not hear of it.
        """
        if self._passes is not None:
            left = self.handover.hear(Word.CANCEL)
            if left in {None, Stage.OFFERED}:
                return left is not None  # whoever waits for the destination tells it so
        self.abandon()
        return True

    def abandon(self) -> None:
        """Break off, from any thread, though the machine may need this side."""
        self._cancelled = True
        self.limit.shutdown()
        for channel in list(self._channels):
            channel.shutdown()

    def _break_off(self) -> None:
        """The destination wants no more, or is gone: let nobody go on sending, or wait to."""
        self._broken_off = True
        self.limit.shutdown()
        for channel in list(self._channels):
            channel.shutdown()

    def is_off(self) -> bool:
        """Whether nobody wants the migration any more."""
        return self._cancelled or self.handover.stage == Stage.RESUMED

    def _check_cancelled(self) -> None:
        if self._cancelled or self._broken_off:
            raise ChannelClosed(_CANCELLED)

    def _open(self, cleanup: ExitStack) -> Channel:
        connected = self._connect(lambda: self._cancelled or self._broken_off)
        channel = cleanup.enter_context(limited(connected, self.limit))
        # Either this sees that it was cancelled, or whoever cancels sees the channel.
        self._channels.append(channel)
        self._check_cancelled()
        return channel

    def _send_all(self, cleanup: ExitStack) -> None:
        machine = self._machine
        passes = self._passes or OnePass(machine, self._meter, cleanup)
        self._send(Header())
        if machine.configuration is not None:
            self._send(machine.configuration)
        if self._answered:
            self._send(OpenReturnPath(), Ping(1))
            if self._passes is not None:
                self._send(*map(Ping, announcement()))
            if self._ownership is not None:
                token = self._ownership.prepare()
                self._send(*map(Ping, (OWNED, token >> 32, token & 0xFFFFFFFF)))
            if self._options.multifd:
                self._send(Ping(CHANNELS), Ping(self._options.multifd))
        urgent = None
        if self._options.postcopy:
            self._check_postcopy()
            urgent = self._open(cleanup) if self._options.preempt else None
            self._send(PostcopyAdvise(machine.page_size, machine.page_size))
        if self._options.multifd:
            self._pages = self._open_pages(cleanup)
        self._send_starts(passes)
        self._send_bytes(machine.early)
        self._send_parts(passes)
        if passes.switches and self._follower is not None:
            return self._switch(urgent, self._follower)
        self._send_rest(passes)
        self._send_ends()
        self._meter.phase("device")
        if self._ownership is not None:
            self._ownership.offer(self.is_off)
        self._send_bytes(machine.devices)
        reach("devices-sent")
        if self.handover.hear(Word.SENT) is None and self._passes is not None:
            raise ChannelClosed(_CANCELLED)
        self._verdict.all_sent()
        self._send(EndOfStream())
        if (text := machine.description) is not None:
            self._send_bytes([bytes([Kind.DESCRIPTION]) + len(text).to_bytes(4), text])
        return None

    def _check_postcopy(self) -> None:
        if not self._answered:
            raise UsageError(
                "postcopy-ram needs a connection that the destination can answer on, and"
                " return-path: use tcp: or unix:"
            )

    def _switch(self, urgent: Channel | None, follower: Follower) -> None:
        """Let the machine run there, and its memory follow."""
        options, machine = self._options, self._machine
        heeds = False
        for _ in range(_LOOKS):
            forgotten = follower.discards_ahead()
            self._verdict.expect(_SWITCHING)
            self._send(*forgotten, Ping(_SWITCHING))
            # When that is answered, all that was sent before is in its place, and what was to be
            # forgotten is: the machine need not stand still meanwhile, but it writes.
            heeds = self._verdict.heeds_go(options.answer)
            if not forgotten:
                break
        self.has_switched = True
        way = Way(self._main, urgent, options.idle, options.answer, heeds)
        follower.follow(way, RamFormat(self._ram, machine.page_size, machine.footers))

    def reconnect(self, connect: Connect) -> tuple[Channel, Channel | None]:
        """Open the channels of postcopy once more, by *connect*, in the thread of :meth:`run`."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()
        self._connect = connect
        self._main = self._open(self._cleanup)
        return self._main, self._open(self._cleanup) if self._options.preempt else None

    def _open_pages(self, cleanup: ExitStack) -> PageSender:
        configuration = self._machine.configuration
        pages = PageSender(
            [self._open(cleanup) for _ in range(self._options.multifd)],
            page_size=self._machine.page_size,
            method=self._options.method,
            level=self._options.level,
            uuid=(configuration.uuid if configuration else None) or _NOBODY,
            meter=self._meter,
            idle=self._options.idle,
            by_reference=self._answered,
        )
        cleanup.callback(pages.close)
        return pages

    # Iterable sections

    def _send_starts(self, passes: Passes) -> None:
        machine = self._machine
        self._meter.active(sum(block.length for block in machine.blocks), machine.page_size)
        self._has_disks = passes.start()
        if self._has_disks:
            self._section(_start(self._disk, DISK_SECTION), [DiskEnd()])
        # Page sizes belong to sources that announce postcopy; nobody else reads them.
        blocks = tuple(replace(block, page_size=None) for block in machine.blocks)
        self._ram_section(_start(self._ram, RAM_SECTION), [RamBlocks(blocks)])
        starts = [record for record in machine.bitmaps if isinstance(record, BitmapStart)]
        self._has_bitmaps = bool(starts)
        if starts:
            self._section(_start(self._bitmap, BITMAP_SECTION), [*starts, BitmapsEnd()])
        passes.begin(lambda section: self._send_bytes([section]))

    def _send_parts(self, passes: Passes) -> None:
        parts = passes.parts(self._pages)
        while True:
            if self._has_disks:
                self._disk_section(SectionPart(self._disk, DISK_SECTION), passes.chunks())
            if (part := next(parts, None)) is None:
                return
            self._ram_section(SectionPart(self._ram, RAM_SECTION), part)
            reach("round-sent")

    def _send_rest(self, passes: Passes) -> None:
        passes.stop()
        if self._has_disks:
            rest = itertools.chain(passes.chunks(), [DiskProgress(100)])
            self._disk_section(SectionEnd(self._disk, DISK_SECTION), rest)
        self._ram_section(SectionEnd(self._ram, RAM_SECTION), passes.rest(self._pages))
        passes.end()

    def _disk_section(self, head: Head, records: Iterable[Encodes]) -> None:
        self._section(head, itertools.chain(records, [DiskEnd()]))

    def _send_ends(self) -> None:
        if self._has_bitmaps:
            self._section(SectionEnd(self._bitmap, BITMAP_SECTION), self._bitmap_contents())

    def _bitmap_contents(self) -> Iterator[Encodes]:
        yield from (r for r in self._machine.bitmaps if not isinstance(r, BitmapStart))
        yield BitmapsEnd()

    def _ram_section(self, head: Head, records: Iterable[Encodes]) -> None:
        """A `ram` section, with all channels in step at its end."""
        self._section(head, itertools.chain(records, self._synchronised()))

    def _synchronised(self) -> Iterator[Encodes]:
        if self._pages is not None:
            self._pages.synchronise()
            if self._flushes:
                yield RamFlush()
        yield RamEnd()

    # Bytes

    def _section(self, head: Head, records: Iterable[Encodes]) -> None:
        self._send(head)
        for record in records:
            self._send(record)
        if self._machine.footers:
            self._send(SectionFooter(head.number))

    def _send(self, *events: Encodes) -> None:
        for event in events:
            match event:
                case Batch():
                    self._meter.count(normal=event.normal, zero=event.zero)
                    self._send_bytes([event.encode()])
                case DiskChunk():
                    parts = event.parts()
                    self._meter.count(disk=sum(map(len, parts)))
                    self._send_bytes(parts)
                case _:
                    self._send_bytes([event.encode()])

    def _send_bytes(self, parts: Sequence[Buffer]) -> None:
        self._main.send(parts, self._options.idle)
        self._meter.count(transferred=sum(len(part) for part in parts))
        self._meter.tick()


def _start(number: int, name: str) -> SectionStart:
    return SectionStart(number, name, 0, VERSIONS[name])


def _flushes_by_record(machine: Outgoing) -> bool:
    version = machine_version(machine.configuration.machine) if machine.configuration else None
    if version is not None:
        return version >= _FLUSHES_SINCE
    # A machine type without a version is that of the QEMU that saved it, and from 8.2 on the
    # description has the configuration in it.
    text = machine.description
    return text is not None and parse_description(text).configuration is not None
