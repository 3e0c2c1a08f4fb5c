"""The destination of a precopy migration: reads every channel, fills a sink, answers the source.

QEMU 7.2 ``migration/migration.c`` (``process_incoming_migration_co``).  The source learns that the
migration succeeded only after the sink has committed; until then the machine is the source's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Final

import numpy as np

from vmferry.errors import (
    ChannelClosed,
    PeerError,
    PeerSilent,
    StreamError,
    TransportError,
    UsageError,
    VmferryError,
)
from vmferry.faults import reach
from vmferry.ownership.engine import Ownership
from vmferry.pages import COMPRESS, XBZRLE, ZERO
from vmferry.transports import Channel, Listener, ReadAhead
from vmferry.transports.base import silent
from vmferry.wire import foreign
from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.buffer import ReceiveBuffer
from vmferry.wire.commands import (
    Command,
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    RamDiscard,
    ReceivedBitmap,
)
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.disk import DiskChunk, DiskEnd
from vmferry.wire.framed import Frame
from vmferry.wire.layout import IGNORE_SHARED
from vmferry.wire.machine import machine_version
from vmferry.wire.multifd import Method
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd, RamFlush, RamPages
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.return_path import Message, Pong, SwitchoverAck
from vmferry.wire.sections import Header, SectionEnd, SectionPart, SectionStart
from vmferry.wire.split import DecodedDevices, split_by_decoding

from .answers import Answers
from .claims import PageClaims
from .connections import Connections, Deadlines
from .last_word import LastWord
from .postcopy.destination import PostcopyDestination, package_parts
from .progress import Meter
from .runs import Runs
from .sink import Loader, Sink
from .takeover import CHANNELS, HEEDS

_SILENCE: Final = 1.0
"""Seconds after which a source that waits for an answer has nothing more to send."""

_ADMIT: Final = 0.2
"""Seconds between two looks for connections that came late."""

_NOT_KEPT: Final = frozenset({foreign.S390_ATTRIBUTES, foreign.SPAPR_HTAB})

_POSTCOPY: Final = (Package, RamDiscard, PostcopyResume, ReceivedBitmap)


class Destination:
    """Receives one machine from *listener* into *sink*.

    *max_ram* bounds guest memory in bytes (default: this machine's memory), *page_size* is the
    target page where the stream does not tell, *tolerate* names what is accepted though a source
    that means well never sends it.  *switchover_ack* says whether to acknowledge the switchover,
    which a source with ``switchover-ack`` waits for and one before QEMU 8.1 refuses to hear
    (default: by the version of the machine type).  *claim* is called once the machine is this
    side's, before its source hears that: where it raises, the source keeps the machine.  *let_go*
    undoes it where the machine turns out to be another's.  *taken* is called as soon as the machine
    is this side's, before the connections are closed.  *dropped* is told of connections that were
    none of a
    source, see :class:`~.connections.Connections`.  *loader* knows the machine's devices and takes
    them; without one the stream's own description tells them apart, and the sink keeps them.
    *ownership* is the record of who owns the machine, if it has one: then it decides.  *postcopy*
    gets the memory of a machine whose source switches to postcopy.
    """

    def __init__(
        self,
        listener: Listener,
        sink: Sink,
        *,
        meter: Meter | None = None,
        deadlines: Deadlines | None = None,
        max_ram: int | None = None,
        page_size: int | None = None,
        tolerate: Tolerate = Tolerate.NOTHING,
        switchover_ack: bool | None = None,
        claim: Callable[[], None] | None = None,
        let_go: Callable[[], None] | None = None,
        taken: Callable[[], None] | None = None,
        dropped: Callable[[Exception], None] | None = None,
        loader: Loader | None = None,
        ownership: Ownership | None = None,
        postcopy: PostcopyDestination | None = None,
    ) -> None:
        self._postcopy = postcopy
        self._package: Package | None = None
        self.runs_early = False
        """Whether the machine runs, and not all of its memory has come."""
        self.is_over = False
        """Whether the machine is this side's, and its source let go of it: no failure takes that
        back."""
        self._sink = sink
        self._claim = claim or (lambda: None)
        self._taken = taken or (lambda: None)
        self._meter = meter or Meter()
        self._deadlines = deadlines or Deadlines()
        self._loader = loader
        self._reader = StreamReader(
            max_ram=max_ram,
            page_size=page_size,
            tolerate=tolerate,
            framed=loader is not None,
            decode=loader.decode if loader is not None else None,
        )
        self._answers = Answers(self._deadlines.idle)
        self._last_word = LastWord(
            self._answers,
            ownership,
            self._meter,
            idle=self._deadlines.idle,
            claim=self._claim,
            let_go=let_go or (lambda: None),
        )
        self._connections = Connections(
            listener,
            self._deadlines,
            self._store,
            self._refuse,
            self._moved,
            dropped,
            None if loader is None else partial(self._in_place, loader),
            one_by_one=postcopy is not None,
        )
        self._switchover_ack = switchover_ack
        self._claims = PageClaims()
        self._unheard: TransportError | None = None
        self._features: set[str] = set()
        self._flushes = False
        self._counts = False
        self._has_machine = False
        self._iterating = False
        self._heads: dict[int, SectionStart] = {}
        self._current = 0
        self._block_order: dict[str, int] = {}
        self._last_page = (-1, 0)

    @property
    def address(self) -> str:
        """The URI for a source on this machine to connect to."""
        return self._connections.address

    def cancel(self) -> None:
        """Give up, from any thread: :meth:`run` raises :class:`~vmferry.errors.ChannelClosed`.

        Without effect once the machine is this side's, as a checkpoint is when it is durable, where
        the source has no last word.
        """
        self._connections.cancel()
        if self._postcopy is not None:
            self._postcopy.cancel()
        self._last_word.cancel()

    def abandon(self) -> None:
        """Let nobody wait for memory any more that will not come: the machine is lost."""
        if self._postcopy is not None:
            self._postcopy.give_up()

    def recover(self, listener: Listener) -> None:
        """Let the source of memory that is still missing come back at *listener*, from any thread.

        Or that of memory which has all come, where it did not hear so.  The listener belongs to
        this from now on.
        """
        if self._postcopy is None:
            raise UsageError("there is no postcopy to recover")
        self._postcopy.recover(listener)

    @property
    def has_followed(self) -> bool:
        """Whether memory has followed the machine, and all of it has come."""
        return self._postcopy is not None and self._postcopy.has_all

    @property
    def waits(self) -> tuple[list[float], float] | None:
        """For how many seconds each processor waited for memory, and all at once, if counted."""
        return None if self._postcopy is None else self._postcopy.waits

    def decide(self, *, take: bool) -> None:
        """An operator's word in the phase ``in-doubt``, from any thread: take it, or drop it."""
        self._last_word.decide(take=take)

    def run(self) -> None:
        """Receive everything, commit it, and tell the source.  For one migration only.

        Raises what went wrong first.  When it returns or raises, every channel is closed and every
        thread has ended; the listener belongs to the caller.
        """
        try:
            self._run()
        except BaseException:
            if not self.is_over:
                self._meter.phase("failed")
            raise
        self._meter.phase("completed")

    def _run(self) -> None:
        try:
            self._receive()
            if self._package is not None and self._postcopy is not None:
                return self._run_early(self._package, self._postcopy)
            self._connections.settle()
            self._check_heard()
            self._meter.phase("storing")
            self._commit()
            if self._last_word.is_awaited:
                self._take_over()
            else:
                self._claim()
                self._answers.confirm()
                self._taken()
            reach("running")
        except BaseException as error:
            # What broke first broke the rest: a source that is refused closes its connections.
            first = self._connections.failure
            self._refuse(first or error)
            self._answers.await_farewell()
            if first is not None and first is not error and isinstance(error, VmferryError):
                raise first from None
            raise
        finally:
            if self._postcopy is not None:
                self._postcopy.close()  # before the channels, on which it has the last word
            self._answers.close()
            self._connections.close()
            self._reader.buffer.drop()

    def _commit(self) -> None:
        self._sink.commit(self._all_features(), footers=bool(self._reader.footers))
        reach("loaded")

    def _run_early(self, package: Package, postcopy: PostcopyDestination) -> None:
        """The machine runs before its memory is here (QEMU 7.2 ``loadvm_postcopy_handle_run``)."""
        self._check_heard()
        try:
            if self._last_word.is_awaited:
                self._last_word.check()
            pings = self._load_package(package, postcopy)
            if self._last_word.is_awaited:
                self._pong(pings)
                postcopy.keep()
                self._last_word.take_early(postcopy)
            else:
                self._claim()
                postcopy.keep()
                self._pong(pings)
        except BaseException:
            self._last_word.decline()
            # Nobody writes to the source but this side again.
            postcopy.give_up()
            self._answers.go_through(None)
            raise
        reach("images-active")
        self._taken()
        reach("running")
        self.runs_early = True
        postcopy.follow()
        self.runs_early = False
        self._answers.confirm()
        reach("shut-said")

    def _load_package(self, package: Package, postcopy: PostcopyDestination) -> list[int]:
        """Have the missing memory fetched, and load the devices meanwhile; the pings to answer."""
        reader = self._reader
        start = reader.continuation()
        pings, devices = package_parts(package)
        urgent = self._connections.accept_preempt(wait=postcopy.preempt)
        self._connections.settle()
        self._answers.go_through(postcopy.say)
        source = self._last_word.source
        postcopy.listen(start, self._main, bytes(reader.buffer.view()), urgent, source)
        if self._loader is not None:
            footers = bool(reader.footers)
            offset = package.offset + len(PostcopyListen().encode())
            self._loader.devices(
                split_by_decoding(devices, self._loader.decode, footers=footers, offset=offset)
            )
        self._commit()
        return pings

    def _pong(self, pings: list[int]) -> None:
        for value in pings:
            self._answers.say(Pong(value))

    def _check_heard(self) -> None:
        """A source that did not hear an answer does not hear of success, and keeps its machine."""
        if self._unheard is not None and not self._last_word.is_announced:
            raise self._unheard

    def _refuse(self, error: BaseException) -> None:
        self._answers.refuse(str(error) if self._last_word.is_announced else None)

    def _take_over(self) -> None:
        """Let the source have the last word, and then it is this side's machine."""
        try:
            self._last_word.take(self._main)
        except BaseException:
            self._last_word.decline()
            self._sink.discard()
            raise
        reach("images-active")
        with suppress(TransportError):  # a source that said go does not take the machine back
            self._answers.confirm()
        self.is_over = True
        try:
            reach("shut-said")
        finally:
            self._taken()

    def _receive(self) -> None:
        reader = self._reader
        channel, head = self._connections.accept_main()
        # Where the pager may have to go on with it, nobody else may be reading.
        main = self._main = channel if self._postcopy is not None else ReadAhead(channel)
        self._answers.attach(main)
        self._meter.start()
        reader.buffer.room()[: len(head)] = head
        reader.buffer.received(len(head))
        self._moved(len(head))
        while True:
            # Either this sees a failure, or whoever failed sees the channel and ends it.
            self._connections.check()
            self._take_events()
            if self._package is not None:
                return None
            if reader.finished:
                return self._check_end(main)
            self._moved(self._more(main))

    def _take_events(self) -> None:
        reader = self._reader
        for event in reader.events():
            if not self._has_machine and not isinstance(event, Header):
                self._has_machine = True
                configuration = event if isinstance(event, Configuration) else None
                self._sink.configuration(configuration, reader.page_size)
            if isinstance(event, Package) and self._postcopy is not None:
                self._package = event
                return  # what follows is for the pager
            try:
                self._handle(event)
            except StreamError as error:
                raise error.within(channel=reader.channel, offset=reader.buffer.offset) from None

    def _more(self, main: Channel) -> int:
        """Wait for more of the stream; how many bytes came."""
        suspicion = self._reader.suspicion
        buffer = self._reader.buffer
        if suspicion is None:
            return self._await_more(main, buffer, self._deadlines.idle)
        try:
            return _received(main, buffer, _SILENCE)
        except ChannelClosed:
            raise
        except TransportError:
            raise suspicion from None

    def _await_more(self, main: Channel, buffer: ReceiveBuffer, idle: float | None) -> int:
        """Wait at most *idle* seconds, and let in channels that are late."""
        waited = 0.0
        self._connections.admit()
        while idle is None or waited + _ADMIT < idle:
            try:
                return _received(main, buffer, _ADMIT)
            except PeerSilent:
                waited += _ADMIT
            self._connections.admit()
        try:
            return _received(main, buffer, idle - waited)
        except PeerSilent:
            raise silent(main.name, "data", idle) from None

    def _check_end(self, main: Channel) -> None:
        """A stream ends where its bytes do: what looks like its end before that is made to."""
        reader = self._reader
        extra = len(reader.buffer)
        if not extra and not reader.return_path and not reader.buffer.ended:
            # Without a way back a source closes its end at once.
            with suppress(TransportError):
                extra = main.recv_into(reader.buffer.room(), _SILENCE)
        if extra:
            raise StreamError(
                "the end of the input behind the end of the stream",
                f"{extra} bytes or more",
                channel=reader.channel,
                offset=reader.buffer.offset,
            )

    def _moved(self, count: int) -> None:
        """Count bytes of any channel."""
        self._meter.count(transferred=count)
        self._meter.tick()

    def _handle(self, event: Any) -> None:
        match event:
            case RamPages():
                self._note_round(event)
                self._store(event)
            case Configuration():
                self._features.update(event.capabilities)
                if event.uuid is not None:
                    self._features.add("validate-uuid")
            case Command():
                self._command(event)
            case RamBlocks():
                self._prepare_memory(event)
            case SectionStart() | SectionPart() | SectionEnd():
                self._section(event)
            case RamFlush() | RamEnd():
                self._synchronise(is_flush=isinstance(event, RamFlush))
            case _:
                self._keep(event)

    def _keep(self, event: Any) -> None:
        match event:
            case DiskChunk():
                self._features.add("block")
                self._sink.disk_chunk(event)
            case DiskEnd() if self._loader is not None:
                self._loader.disks_sent()
            case BitmapRecord():
                self._features.add("dirty-bitmaps")
                self._sink.bitmap(event)
            case DeviceSection() | DeviceRegion():
                self._sink.device(event, early=not self._iterating)
            case VmDescription():
                self._sink.description(event)
            case Frame() | DecodedDevices() if self._loader is not None:
                self._load(self._loader, event)

    def _section(self, event: SectionStart | SectionPart | SectionEnd) -> None:
        if event.name in _NOT_KEPT:
            raise PeerError(
                f"the machine has a section {event.name}, which cannot be kept yet;"
                " inspect reads it from a stream file (in QEMU: migrate exec:cat>FILE)"
            )
        self._current = event.number
        if isinstance(event, SectionStart):
            self._heads[event.number] = event
        self._iterating = not isinstance(event, SectionStart)

    def _load(self, loader: Loader, event: Frame | DecodedDevices) -> None:
        if isinstance(event, Frame):
            loader.piece(self._heads[self._current], event)
        else:
            loader.devices(event)

    # Guest memory

    def _prepare_memory(self, event: RamBlocks) -> None:
        page_size = self._reader.page_size
        self._sink.ram_blocks(event)
        self._block_order = {block.name: order for order, block in enumerate(event.blocks)}
        self._claims.announce(event.blocks, page_size)
        self._connections.announce_ram({block.name: block for block in event.blocks}, page_size)
        self._meter.active(event.total, page_size)
        reach("memory-known")

    def _store(self, batch: RamPages) -> None:
        """Hand pages on; called by the thread of every channel."""
        if self._connections.multifd:
            pages = batch.offsets // np.uint64(batch.page_size)
            with self._claims.held(batch.block.name, [pages]):
                self._sink.pages(batch)
        else:
            self._sink.pages(batch)
        words = batch.rows["word"]
        flags = int(np.bitwise_or.reduce(words)) & (batch.page_size - 1)
        zero = int(np.count_nonzero(words & np.uint64(ZERO))) if flags & ZERO else 0
        for flag, feature in ((XBZRLE, "xbzrle"), (COMPRESS, "compress")):
            if flags & flag:  # on the main channel only
                self._features.add(feature)
        self._meter.count(normal=len(words) - zero, zero=zero)

    @contextmanager
    def _in_place(self, loader: Loader, block: RamBlock, runs: Runs) -> Iterator[memoryview]:
        """Lend the memory of a block for these pages; called by the thread of every channel."""
        with self._claims.held(block.name, [slice(first, last) for first, last in runs]):
            yield loader.room(block.name, runs)
        self._meter.count(normal=sum(last - first for first, last in runs))

    def _note_round(self, batch: RamPages) -> None:
        # Nothing in the stream marks a new pass: it shows where pages start again from the front.
        words = batch.rows["word"]
        order = self._block_order[batch.block.name]
        if (order, int(words[0])) < self._last_page or self._last_page[0] < 0:
            self._meter.next_round()
        self._last_page = (order, int(words[-1]))

    def _synchronise(self, *, is_flush: bool) -> None:
        """Wait for the multifd channels, at each flush or, where there are none, each end."""
        reach("pages-stored")
        if self._flushes and not is_flush:
            return
        self._flushes = is_flush
        self._connections.synchronise()
        if is_flush and not self._connections.multifd:
            raise StreamError("multifd channels, as there is a flush of them", "none")

    # Commands, and answers

    def _command(self, command: Command) -> None:
        # However many have been read already, they do not keep a migration from ending.
        self._connections.check()
        match command:
            case OpenReturnPath():
                self._open_return_path()
            case Ping():
                if not self._reader.return_path:
                    raise PeerError("the source sent a ping but has opened no return path")
                self._answer(Pong(command.value))
                if self._counts:
                    self._connections.expect(command.value)
                self._counts = command.value == CHANNELS
                if self._last_word.note(command.value) and self._postcopy is not None:
                    self._answer(Pong(HEEDS))
            case PostcopyAdvise() if command.page_sizes is not None:  # else only for bitmaps
                self._features.add("postcopy-ram")
                self._connections.allow_preempt()
                self._advise(command)
            case RamDiscard() if self._postcopy is not None:
                self._postcopy.discard(command)
            case EnableColo():
                raise PeerError("the source wants COLO fault tolerance: turn x-colo off")
            case _ if isinstance(command, _POSTCOPY):
                raise PeerError(
                    "the source has switched to postcopy, which cannot be received into a"
                    " checkpoint: let it finish in precopy (no migrate-start-postcopy)"
                )

    def _advise(self, command: PostcopyAdvise) -> None:
        """The source may switch to postcopy: refuse now what could not be refused then."""
        if self._loader is None:
            return
        if self._postcopy is None:
            raise PeerError(
                "the source may switch to postcopy: turn postcopy-ram on here too, or off there"
            )
        if not self._reader.return_path:
            raise PeerError("the source announced postcopy and has opened no return path")
        configuration = self._reader.configuration
        if configuration is not None and IGNORE_SHARED in configuration.capabilities:
            raise PeerError(
                "the source announced postcopy with x-ignore-shared: turn one off there"
            )
        os.close(self._main.duplicate())
        self._postcopy.advise(command)

    def _answer(self, message: Message) -> None:
        """Say *message*; of a source that has ended, what it sent before may still be all."""
        try:
            self._answers.say(message)
        except ChannelClosed:
            raise  # this side's own doing
        except TransportError as error:
            if not isinstance(error.__cause__, ConnectionError):
                raise
            self._unheard = self._unheard or error

    def _open_return_path(self) -> None:
        self._answers.open()
        self._features.add("return-path")
        if self._acknowledges():
            self._answer(SwitchoverAck())

    def _acknowledges(self) -> bool:
        if self._switchover_ack is not None:
            return self._switchover_ack
        configuration = self._reader.configuration
        version = machine_version(configuration.machine) if configuration else None
        return version is not None and version >= (8, 1)

    def _all_features(self) -> frozenset[str]:
        methods = self._connections.methods
        features = set(self._features)
        if methods:
            features.add("multifd")
        features.update(f"multifd-compression={m.name.lower()}" for m in methods - {Method.NONE})
        return frozenset(features)


def _received(main: Channel, buffer: ReceiveBuffer, timeout: float | None) -> int:
    """Have *buffer* receive more; how many bytes."""
    if isinstance(main, ReadAhead):
        return main.receive(buffer, timeout)
    count = main.recv_into(buffer.room(), timeout)
    buffer.received(count)
    return count
