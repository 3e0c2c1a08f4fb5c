"""Serving a destination that runs the machine, or loads it: what it asks for, and all the rest.

QEMU 7.2 ``migration/migration.c`` and ``ram.c``.  One thread answers and, where nobody asks, sends
the rest: a request waits for nothing but what is in the socket already, and that is kept short.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    PeerError,
    PeerSilent,
    Refused,
    TransportError,
    VmferryError,
)
from vmferry.faults import reach
from vmferry.migration.progress import Meter
from vmferry.migration.takeover import GO, READY
from vmferry.ownership.identity import NUMBERS, Identity
from vmferry.transports import Buffer, Channel, RateLimit
from vmferry.units import format_duration
from vmferry.wire.commands import (
    Command,
    Package,
    Ping,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    ReceivedBitmap,
)
from vmferry.wire.layout import RAM_SECTION
from vmferry.wire.ram import RamEnd
from vmferry.wire.return_path import (
    HavePages,
    Message,
    Pong,
    Reason,
    RequestPages,
    ResumeAck,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)
from vmferry.wire.sections import EndOfStream, SectionFooter, SectionPart

from .left import Block, Left, Run
from .records import ROOM, Records

LOADED: Final = 3
"""The ping inside the package: its answer says that all devices are loaded."""

MOST_ASKED: Final = 1 << 20
"""Pages of which it is kept that they were asked for: those of 4 GiB."""

_LOOK: Final = 0.1
"""Seconds between two looks at whether it was given up, or a limit was changed."""

_QUIET: Final = 0.02
"""Seconds without a request after which the rest begins to follow a machine that runs."""

_AT_MOST: Final = 0.1
"""Seconds after which it does anyway."""

_MANY: Final = 16
_DENSE: Final = 0.002
"""So many requests in so few seconds, and the machine goes over memory: the rest does at once."""

_LAST_WORDS: Final = 0.5
"""Seconds to look for what a destination that has gone had said."""

_KEEP: Final = 256 << 10
"""Bytes of the background that may wait in the socket in front of an urgent page."""


@dataclass(slots=True)
class Service:
    """What was asked for and how fast it was answered; times in seconds since the connection.

    ``asked`` has block number and unit of each page that was asked for and not sent before, one
    behind the other, up to :data:`MOST_ASKED` of them, and ``asked_at`` when.  ``loaded`` is when
    the destination said that all devices are loaded, after which it runs.
    """

    requests: int = 0
    late: int = 0
    pages: int = 0
    loaded: float | None = None
    asked: array[int] = field(default_factory=lambda: array("Q"))
    asked_at: array[float] = field(default_factory=lambda: array("d"))
    took: array[float] = field(default_factory=lambda: array("d"))


@dataclass(frozen=True, slots=True)
class RamFormat:
    """How the section `ram` is written: its number, and whether sections end with a footer."""

    number: int
    page_size: int
    footers: bool

    def end_of_part(self) -> list[bytes]:
        """What ends a part of it, or its start."""
        footer = [SectionFooter(self.number).encode()] if self.footers else []
        return [RamEnd().encode(), *footer]


def package_of(devices: Iterable[bytes]) -> bytes:
    """The devices of a machine, which are loaded while memory is served, and the word to run it."""
    parts = [
        PostcopyListen().encode(),
        *map(bytes, devices),
        Ping(LOADED).encode(),
        PostcopyRun().encode(),
    ]
    return Package(b"".join(parts)).encode()


class MemoryServer:
    """Serves the memory in *blocks* over the channels that it is attached to.

    *idle* is how many seconds the destination may read nothing, *answer* how many it may take for
    an answer; ``None`` is for ever.  *limit* bounds the background.  *given_up* is asked now and
    then: where it is true what waits raises :class:`ChannelClosed`.  *loaded* is called when the
    destination says that all devices are loaded.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        ram: RamFormat,
        *,
        idle: float | None,
        answer: float | None,
        limit: RateLimit,
        meter: Meter,
        service: Service,
        given_up: Callable[[], bool] = lambda: False,
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = blocks
        self._ram = ram
        self._idle = idle
        self._answer_within = answer
        self._limit = limit
        self._meter = meter
        self._given_up = given_up
        self._loaded = loaded
        self.service = service
        self.left = Left(blocks)
        self._began = self._received = 0.0
        self._ready: list[int] = []
        self._times: deque[float] = deque(maxlen=_MANY)
        self.is_taken = False
        """Whether the destination has heard *go*, so that the machine may have run there."""
        self._reason = ""

    def attach(self, main: Channel, urgent: Channel | None = None) -> None:
        """Go on over these channels; *urgent* is that of ``postcopy-preempt``."""
        unit = max(block.unit for block in self._blocks)
        room = max(ROOM, unit)
        largest = max(block.ram.length for block in self._blocks)
        self._reader = ReturnPathReader(max_bitmap=largest // self._ram.page_size // 8 + 8)
        self._main = main
        self._began = self._began or time.perf_counter()
        main.keep_little(_KEEP)
        self._records = Records(self._ram.page_size, room)
        self._most = max(room // unit, 1)
        self._urgent, self._urgent_records = main, self._records
        if urgent is not None:
            self._urgent, self._urgent_records = urgent, Records(self._ram.page_size, room)

    def send(self, parts: Sequence[bytes]) -> None:
        """Send whole sections."""
        self._write(self._main, [part for part in parts if part])
        self._meter.count(transferred=sum(map(len, parts)))

    def begin(self, *before: bytes) -> None:
        """Behind the sections *before* pages may be sent."""
        self.send([*before, SectionPart(self._ram.number, RAM_SECTION).encode()])

    def interject(self, *commands: Command) -> None:
        """Send commands between two parts."""
        self.begin(*self._ram.end_of_part(), *(command.encode() for command in commands))

    def resume(self, *before: Command) -> None:
        """Hear what arrived, and go on behind it (QEMU 3.0); *before* says who goes on."""
        self.send([command.encode() for command in before])
        self.send([ReceivedBitmap(block.ram.name).encode() for block in self._blocks])
        for block in self._blocks:
            match self._await(self._answer_deadline()):
                case HavePages(name, bitmap) if name == block.ram.name:
                    block.have(bitmap, self._ram.page_size)
                case other:
                    raise _unexpected(other, f"the pages of {block.ram.name!r}")
        self.left.again()
        self.send([PostcopyResume().encode()])
        if not isinstance(found := self._await(self._answer_deadline()), ResumeAck):
            raise _unexpected(found, "that the migration is resumed")
        if self.service.loaded is None:
            self.service.loaded = time.perf_counter() - self._began

    def await_loaded(self) -> None:
        """Return once the destination has loaded all devices, which may need memory."""
        # Nothing else shall stand in the way of what the devices ask for.
        self._await_word(
            lambda: self.service.loaded is not None, "load the devices", lambda: self.left.expects
        )

    def await_ready(self) -> Identity:
        """Return once the destination says that it waits for a *go*; who it is."""
        self._await_word(lambda: len(self._ready) > NUMBERS, "be ready")
        return Identity.from_numbers(self._ready[1:])

    def await_taken(self) -> None:
        """Return once the destination has heard *go*."""
        self._await_word(lambda: self.is_taken, "take the machine")

    def _await_word(
        self, is_said: Callable[[], bool], what: str, sends: Callable[[], bool] = lambda: True
    ) -> None:
        """Serve until the destination has said something, as long as an answer may take in all."""
        until = self._answer_deadline()
        more = True
        while not is_said():
            if until is not None and time.monotonic() >= until:
                raise PeerSilent(
                    f"waited {format_duration(self._answer_within or 0)} for the destination to"
                    f" {what}, it did not say so"
                )
            more = self._turn(sending=more and sends(), until=until)

    def drain(self) -> None:
        """Hear what was said before the connection ended.

        Raises :class:`Refused` where that is why it did.
        """
        deadline = time.monotonic() + _LAST_WORDS
        try:
            while not self.is_taken:
                self._hear(self._await(deadline))
        except Refused:
            raise
        except VmferryError:
            pass  # that it ended is known

    def serve(self) -> None:
        """Answer requests, and send the rest where there are none, until there is no more."""
        begun = time.monotonic()
        while (until := self._rest_waits(begun)) is not None:
            self._turn(sending=self.left.expects, until=until)
        while self._turn(sending=True):
            pass

    def _rest_waits(self, begun: float) -> float | None:
        """Until when the rest waits for a machine that has *begun* to run, if it does.

        The machine has much to do then, and placing memory takes processors from it, that of the
        destination most of all.
        """
        now, times = time.monotonic(), self._times
        if len(times) == _MANY and times[-1] - times[0] < _DENSE:
            return None
        last = times[-1] if times else begun
        until = min(max(begun, last) + _QUIET, begun + _AT_MOST)
        return until if now < until else None

    def finish(self) -> None:
        """Everything is sent: end the stream, and return once the destination says that it has it.

        Raises :class:`Refused` where it says anything else.
        """
        if self._urgent is not self._main:
            self._write(self._urgent, [RamEnd().encode()])
        self.send([*self._ram.end_of_part(), EndOfStream().encode()])
        deadline = self._answer_deadline()
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

    def _turn(self, *, sending: bool, until: float | None = None) -> bool:
        """Do what is to be done next, or nothing up to *until*; whether there may be more."""
        # The limit is for the background: nobody who asks waits for it.
        due = self._limit.due() if sending else 0.0
        sending = sending and not due
        patience = self._idle if sending else due or None
        deadline = None if patience is None else time.monotonic() + patience
        ends = [moment for moment in (deadline, until) if moment is not None]
        while True:
            if self._given_up():
                raise ChannelClosed("the migration was cancelled on this side")
            left = min([_LOOK, *(moment - time.monotonic() for moment in ends)])
            readable, writable = self._main.turn(max(left, 0), sending=sending)
            if readable:
                self._receive()
                self._answer()
                return True
            if writable:
                return self._send_next()
            if due or (until is not None and time.monotonic() >= until):
                return True
            if deadline is not None and time.monotonic() >= deadline:
                raise PeerSilent(
                    f"waited {format_duration(patience or 0)} for the destination to read on, it"
                    " did not"
                )

    def _answer(self) -> None:
        """Send all that is waited for."""
        while (run := self.left.urgent()) is not None:
            parts, pages = self._urgent_records.of(run, asked=True)
            self._write(self._urgent, parts)
            self.service.took.append(time.perf_counter() - self._received)
            self._count(run, parts, pages)

    def _send_next(self) -> bool:
        # What is wanted soon will be asked for even where it is zero.
        soon = self.left.soon(self._most)
        run = soon or self.left.next(self._most)
        if run is None:
            return False
        parts, pages = self._records.of(run, asked=soon is not None)
        if parts:
            self._write(self._main, parts)
        # Pages of zeros that nobody wants are not sent, and wait for no limit.
        self._limit.spend(self._count(run, parts, pages))
        return True

    def _count(self, run: Run, parts: Sequence[Buffer], pages: int) -> int:
        """Take note of what was sent; how many bytes that took."""
        self.service.pages += pages
        size = sum(map(len, parts))
        zero = run.count * run.block.unit // self._ram.page_size - pages
        self._meter.count(transferred=size, normal=pages, zero=zero)
        self._meter.tick()
        return size

    def _write(self, channel: Channel, parts: Sequence[Buffer]) -> None:
        try:
            channel.send(parts, self._idle)
        except TransportError:
            self.drain()
            raise

    # Answers

    def _receive(self) -> None:
        buffer = self._reader.buffer
        buffer.received(self._main.recv_into(buffer.room(), self._idle))
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
                self._times.append(time.monotonic())
                asked = self.left.ask(block, start, length)
                service.late += not asked
                if len(service.asked_at) < MOST_ASKED:
                    service.asked.extend(chain.from_iterable(asked))
                    service.asked_at.extend([self._received - self._began] * len(asked))
            case Pong(value) if value == LOADED and service.loaded is None:
                service.loaded = time.perf_counter() - self._began
                self._loaded()
                reach("loaded-heard")
            case Pong(value) if value == READY or 0 < len(self._ready) <= NUMBERS:
                self._ready.append(value)
            case Pong(value) if value == GO and self._ready:
                self.is_taken = True
            case Pong() | SwitchoverAck():
                pass
            case Reason(text):
                self._reason = text
            case Shut():
                why = f": {self._reason}" if self._reason else "; its own messages say why"
                raise Refused(f"the destination gave the machine up{why}")
            case other:
                raise _unexpected(other, "a request for pages")

    def _answer_deadline(self) -> float | None:
        """When an answer to what is said now is late."""
        within = self._answer_within
        return None if within is None else time.monotonic() + within

    def _await(self, deadline: float | None) -> Message:
        """The next message; whatever else comes does not move the *deadline*."""
        buffer = self._reader.buffer
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise PeerSilent(
                    "waited for an answer of the destination, and it said other things"
                )
            for message in self._reader.events():
                return message
            if buffer.ended:
                raise self._gone()
            buffer.received(self._main.recv_into(buffer.room(), left))

    def _gone(self) -> TransportError | PeerError:
        if self.service.loaded is not None:
            return TransportError("the destination closed the connection before it had everything")
        return PeerError(
            "the destination closed the connection before it ran the machine; its own messages say"
            " why: is it the same machine, with the capability postcopy-ram?"
        )


def _unexpected(found: Message, expected: str) -> PeerError:
    return PeerError(f"expected {expected} from the destination, found {type(found).__name__}")
