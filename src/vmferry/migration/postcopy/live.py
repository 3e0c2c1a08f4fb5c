"""The source of a machine that runs, from where it switches to postcopy on.

QEMU 7.2 ``postcopy_start`` in ``migration/migration.c`` and ``migration/ram.c``.  The machine is
stopped, the destination told to forget what of its memory is out of date, and sent the devices in
one package; then it runs there, and its memory is served from here until all of it has gone.  Where
the connection is lost meanwhile, the migration is paused, and goes on over another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.errors import ChannelClosed, InDoubt, PeerError, Refused, VmferryError
from vmferry.faults import reach
from vmferry.memory import PAGE_SIZE
from vmferry.memory.bits import get_bits, spans
from vmferry.migration.handover import Handover, Word
from vmferry.migration.outgoing import Outgoing
from vmferry.migration.precopy import DirtyBlock
from vmferry.migration.progress import Meter
from vmferry.migration.takeover import ABORT, GO, GRANTED, announcement, has_died
from vmferry.ownership.engine import Ownership
from vmferry.ownership.identity import Identity
from vmferry.transports import Channel, RateLimit
from vmferry.wire.commands import Ping, RamDiscard

from .left import Block
from .server import MemoryServer, RamFormat, Service, package_of
from .way import Way

_RANGES: Final = 12
"""Ranges in a command, as many as QEMU puts there."""

_MOST_RANGES: Final = 1 << 9
"""Ranges told one by one: the machine stands still meanwhile."""


class Lead(Protocol):
    """Who leads the migration, as far as postcopy goes."""

    @property
    def service(self) -> Service:
        """Counts what is asked for."""

    @property
    def background(self) -> RateLimit:
        """The limit of what nobody has asked for."""

    def gone(self) -> None:
        """The machine is the destination's, and runs there: its downtime is over."""

    def remains(self, size: int) -> None:
        """So many bytes are to be sent now."""

    def paused(self, error: VmferryError) -> None:
        """The connection is lost, and the machine waits there for memory."""

    def await_resume(self) -> Callable[[], tuple[Channel, Channel | None]]:
        """Wait until somebody wants to go on; what opens the channels to go on with.

        Raises :class:`ChannelClosed` where nobody will.
        """

    def resumed(self) -> None:
        """It goes on."""


class LiveStore:
    """The memory of a machine that stands still."""

    def __init__(self, block: DirtyBlock) -> None:
        self._content = block.content
        self._known = block.known

    def read(self, offset: int, *buffers: memoryview) -> None:
        """See :class:`~.left.LazyStore`."""
        for buffer in buffers:
            buffer[:] = self._content[offset : offset + len(buffer)]
            offset += len(buffer)

    def data_from(self, offset: int) -> tuple[int, int] | None:
        """See :class:`~.left.LazyStore`; what never had memory is zero."""
        first = offset // PAGE_SIZE
        starts, ends = self._stretches
        at = int(np.searchsorted(ends, first, "right"))
        if at == len(ends):
            return None
        return max(int(starts[at]), first) * PAGE_SIZE, int(ends[at]) * PAGE_SIZE

    @cached_property
    def _stretches(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        return spans(self._known != 0)


def left_of(blocks: Sequence[DirtyBlock], ahead: Sequence[Block] = ()) -> list[Block]:
    """What is still to be sent of memory, some of which the destination has.

    What was told *ahead* to be forgotten there is to be sent in any case.
    """
    found = []
    for number, dirty in enumerate(blocks):
        block = Block(dirty.block, LiveStore(dirty), PAGE_SIZE)
        block.sent = ~get_bits(dirty.dirty, dirty.memory.pages)
        if ahead:
            block.sent &= ahead[number].sent
        found.append(block)
    return found


def discards(blocks: Sequence[Block], ahead: Sequence[Block] = ()) -> Iterator[RamDiscard]:
    """Have the destination forget what is out of date there and was not told *ahead*.

    Without that at least one page, or it is not ready for postcopy.  Where that is very many small
    ranges, some of what lies between them goes with them.
    """
    if not ahead and all(block.sent.all() for block in blocks):
        blocks[0].sent[0] = False
    for number, block in enumerate(blocks):
        told = ahead[number].sent if ahead else True
        starts, ends = spans(~block.sent & told)
        gap = 1
        while len(starts) > _MOST_RANGES:
            gap *= 2
            near = np.flatnonzero(starts[1:] - ends[:-1] <= gap)
            for one in near.tolist():
                block.sent[ends[one] : starts[one + 1]] = False
            starts, ends = np.delete(starts, near + 1), np.delete(ends, near)
        sizes = ((ends - starts) * block.unit).tolist()
        ranges = list(zip((starts * block.unit).tolist(), sizes, strict=True))
        for first in range(0, len(ranges), _RANGES):
            yield RamDiscard(block.ram.name, tuple(ranges[first : first + _RANGES]))


class Follow:
    """Gives *machine*, which stands still, to the destination, and sends what is left of *blocks*.

    *forget* is what it has to be told to forget of what it has.  *is_off* says whether somebody
    wants no migration any more, as long as that counts.
    """

    def __init__(
        self,
        machine: Outgoing,
        blocks: Sequence[Block],
        forget: Sequence[RamDiscard],
        ram: RamFormat,
        way: Way,
        *,
        lead: Lead,
        handover: Handover,
        ownership: Ownership | None,
        meter: Meter,
        is_off: Callable[[], bool],
    ) -> None:
        self._machine = machine
        self._forget = forget
        self._way = way
        self._lead = lead
        self._handover = handover
        self._ownership = ownership
        self._meter = meter
        self._is_off = is_off
        self._destination: Identity | None = None
        self._server = MemoryServer(
            blocks,
            ram,
            idle=way.idle,
            answer=way.answer,
            limit=lead.background,
            meter=meter,
            service=lead.service,
            given_up=is_off,
        )

    def run(self) -> None:
        """Return once the destination has everything.

        Raises what went wrong; the handover says whose the machine is then.
        """
        self._server.attach(self._way.main, self._way.urgent)
        if self._ownership is not None:
            self._ownership.offer(self._is_off)
        try:
            self._send_package()
            self._give()
        except Refused:
            self._handover.hear(Word.REFUSED)
            raise
        except VmferryError as error:
            if self._handover.hear(Word.LOST) is None or self._handover.may_run:
                raise
            raise InDoubt(
                f"the destination was sent the machine and did not say that it has loaded it"
                f" ({error}); it stays stopped here until an operator who knows that it does not"
                " run there starts it"
            ) from error
        self._serve()
        self._handover.hear(Word.SHUT)
        if self._ownership is not None:
            self._ownership.given()

    def _send_package(self) -> None:
        package = package_of(self._machine.devices)
        self._server.send([command.encode() for command in self._forget])
        reach("discards-sent")
        self._hear(Word.SENT)
        if not self._way.heeds:
            self._hear(Word.READY)  # it runs what it has loaded, and says so afterwards
        self._server.send([package])
        self._server.begin()
        reach("package-sent")

    def _hear(self, word: Word) -> None:
        if self._handover.hear(word) is None:
            raise ChannelClosed("the migration was cancelled on this side")

    def _give(self) -> None:
        """Hear that it is loaded, and let go of the machine."""
        server = self._server
        if not self._way.heeds:
            return server.await_loaded()
        try:
            server.await_loaded()
            self._destination = server.await_ready()
            reach("ready-heard")
            if self._ownership is not None:
                self._ownership.grant(self._is_off)
            self._hear(Word.READY)
        except VmferryError:
            self._abort()
            raise
        return None

    def _abort(self) -> None:
        """Tell the destination, where that is possible; else it stays paused."""
        with suppress(VmferryError):
            self._server.interject(Ping(ABORT))

    def _serve(self) -> None:
        server = self._server
        try:
            self._say_go()
        except ChannelClosed:
            raise
        except Refused:
            if not server.is_taken:
                self._handover.hear(Word.REFUSED)
            raise
        except VmferryError as error:
            if self._handover.may_run:
                raise
            self._lead.gone()
            self._go_on(error)
        else:
            self._lead.gone()
            self._lead.remains(server.left.remaining)
            self._meter.phase("postcopy-active")
        while True:
            try:
                server.serve()
                return server.finish()
            except (ChannelClosed, Refused):
                raise
            except VmferryError as error:
                self._go_on(error)

    def _say_go(self) -> None:
        server, destination = self._server, self._destination
        if destination is None:
            return
        try:
            server.interject(Ping(GO if self._ownership is None else GRANTED))
            reach("go-said")
            if self._ownership is None:
                server.await_taken()
        except VmferryError as error:
            if self._ownership is None and has_died(self._way.main, destination):
                server.drain()
                if not server.is_taken:
                    self._handover.hear(Word.GONE)
                    raise PeerError("the destination died before it took the machine") from error
            raise

    def _go_on(self, error: VmferryError) -> None:
        """Wait for another connection, and for the destination to say what it has."""
        while True:
            self._meter.phase("postcopy-paused")
            self._lead.paused(error)
            connect = self._lead.await_resume()
            self._meter.phase("postcopy-recover")
            try:
                self._server.attach(*connect())
                reach("reconnected")
                self._server.resume(*(map(Ping, announcement()) if self._way.heeds else ()))
                self._server.begin()
            except ChannelClosed:
                raise
            except VmferryError as again:
                error = again
                continue
            self._lead.remains(self._server.left.remaining)
            self._lead.resumed()
            self._meter.phase("postcopy-active")
            return
