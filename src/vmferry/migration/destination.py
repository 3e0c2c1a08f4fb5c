"""The destination of a precopy migration: reads every channel, fills a sink, answers the source.

QEMU 7.2 ``migration/migration.c`` (``process_incoming_migration_co``).  The source learns that the
migration succeeded only after the sink has committed; until then the machine is the source's.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

import numpy as np

from vmferry.errors import ChannelClosed, PeerError, StreamError, TransportError, VmferryError
from vmferry.pages import COMPRESS, XBZRLE, ZERO
from vmferry.transports import Channel, Listener
from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.commands import (
    Command,
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyResume,
    RamDiscard,
    ReceivedBitmap,
)
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.disk import DiskChunk
from vmferry.wire.machine import machine_version
from vmferry.wire.multifd import Method
from vmferry.wire.ram import RamBlocks, RamEnd, RamFlush, RamPages
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.return_path import Message, Pong, Shut, SwitchoverAck
from vmferry.wire.sections import SectionEnd, SectionPart

from .connections import Connections, Deadlines
from .progress import Meter
from .sink import Sink

_SILENCE = 1.0
"""Seconds after which a source that waits for an answer has nothing more to send."""

_POSTCOPY = (Package, RamDiscard, PostcopyResume, ReceivedBitmap)


class Destination:
    """Receives one machine from *listener* into *sink*.

    *max_ram* bounds guest memory in bytes (default: this machine's memory), *page_size* is the
    target page where the stream does not tell, *tolerate* names what is accepted though a source
    that means well never sends it.  *switchover_ack* says whether to acknowledge the switchover,
    which a source with ``switchover-ack`` waits for and one before QEMU 8.1 refuses to hear
    (default: by the version of the machine type).
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
    ) -> None:
        self._sink = sink
        self._meter = meter or Meter()
        self._deadlines = deadlines or Deadlines()
        self._reader = StreamReader(max_ram=max_ram, page_size=page_size, tolerate=tolerate)
        self._connections = Connections(
            listener, self._deadlines, self._store, self._refuse, self._moved
        )
        self._switchover_ack = switchover_ack
        self._main: Channel | None = None
        self._answering = threading.Lock()
        self._answered = False
        self._features: set[str] = set()
        self._flushes = False
        self._described_machine = False
        self._iterating = False
        self._block_order: dict[str, int] = {}
        self._last_page = (-1, 0)

    @property
    def address(self) -> str:
        """The URI for a source on this machine to connect to."""
        return self._connections.address

    def cancel(self) -> None:
        """Give up, from any thread: :meth:`run` raises :class:`~vmferry.errors.ChannelClosed`.

        Without effect once everything has come: then the checkpoint is completed.
        """
        self._connections.cancel()

    def run(self) -> None:
        """Receive everything, commit it, and tell the source."""
        try:
            self._receive()
            self._connections.settle()
            self._meter.phase("storing")
            self._sink.commit(self._all_features(), footers=bool(self._reader.footers))
            self._answer(Shut(0))
            self._meter.phase("completed")
        except BaseException as error:
            # What broke first broke the rest: a source that is refused closes its connections.
            first = self._connections.failure
            self._refuse()
            self._meter.phase("failed")
            if first is not None and first is not error and isinstance(error, VmferryError):
                raise first from None
            raise
        finally:
            self._connections.close()

    def _receive(self) -> None:
        reader = self._reader
        self._main, head = self._connections.accept_main()
        self._main.name = reader.channel
        self._meter.start()
        reader.buffer.room()[: len(head)] = head
        reader.buffer.received(len(head))
        self._moved(len(head))
        while True:
            for event in reader.events():
                self._handle(event)
            if reader.finished:
                return self._check_end()
            count = self._more(self._main)
            reader.buffer.received(count)
            self._moved(count)

    def _more(self, main: Channel) -> int:
        """Wait for more of the stream; how many bytes came."""
        suspicion = self._reader.suspicion
        room = self._reader.buffer.room()
        if suspicion is None:
            return main.recv_into(room, self._deadlines.idle)
        try:
            return main.recv_into(room, _SILENCE)
        except ChannelClosed:
            raise
        except TransportError:
            raise suspicion from None

    def _check_end(self) -> None:
        """A stream ends where its bytes do: what looks like its end before that is made to."""
        reader, main = self._reader, self._main
        extra = len(reader.buffer)
        if main is not None and not extra and not reader.return_path and not reader.buffer.ended:
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
            case Configuration() | Command() | RamBlocks():
                self._prepare(event)
            case SectionPart() | SectionEnd():
                self._iterating = True
            case RamFlush():
                self._flushes = True
                self._synchronise()
            case RamEnd() if not self._flushes:
                self._synchronise()
            case DiskChunk():
                self._features.add("block")
                self._sink.disk_chunk(event)
            case BitmapRecord():
                self._features.add("dirty-bitmaps")
                self._sink.bitmap(event)
            case DeviceSection() | DeviceRegion():
                self._sink.device(event, early=not self._iterating)
            case VmDescription():
                self._sink.description(event)

    def _prepare(self, event: Configuration | Command | RamBlocks) -> None:
        """What stands before the machine's memory and state."""
        match event:
            case Configuration():
                self._described_machine = True
                self._features.update(event.capabilities)
                if event.uuid is not None:
                    self._features.add("validate-uuid")
                self._sink.configuration(event, self._reader.page_size)
            case Command():
                self._command(event)
            case RamBlocks():
                if not self._described_machine:
                    self._sink.configuration(None, self._reader.page_size)
                self._sink.ram_blocks(event)
                blocks = {block.name: block for block in event.blocks}
                self._block_order = {name: order for order, name in enumerate(blocks)}
                self._connections.announce_ram(blocks, self._reader.page_size)
                self._meter.active(event.total, self._reader.page_size)

    def _store(self, batch: RamPages) -> None:
        """Hand pages on; called by the thread of every channel."""
        self._sink.pages(batch)
        words = batch.rows["word"]
        flags = int(np.bitwise_or.reduce(words)) & (batch.page_size - 1)
        zero = int(np.count_nonzero(words & np.uint64(ZERO))) if flags & ZERO else 0
        for flag, feature in ((XBZRLE, "xbzrle"), (COMPRESS, "compress")):
            if flags & flag:
                self._features.add(feature)
        self._meter.count(normal=len(words) - zero, zero=zero)

    def _note_round(self, batch: RamPages) -> None:
        # Nothing in the stream marks a new pass: it shows where pages start again from the front.
        words = batch.rows["word"]
        order = self._block_order[batch.block.name]
        if (order, int(words[0])) < self._last_page or self._last_page[0] < 0:
            self._meter.next_round()
        self._last_page = (order, int(words[-1]))

    def _synchronise(self) -> None:
        self._connections.synchronise(preempt="postcopy-ram" in self._features)

    # Commands, and answers

    def _command(self, command: Command) -> None:
        match command:
            case OpenReturnPath():
                self._open_return_path()
            case Ping():
                if not self._reader.return_path:
                    raise PeerError("the source sent a ping but has opened no return path")
                self._answer(Pong(command.value))
            case PostcopyAdvise() if command.page_sizes is not None:  # else only for bitmaps
                self._features.add("postcopy-ram")
            case EnableColo():
                raise PeerError("the source wants COLO fault tolerance: turn x-colo off")
            case _ if isinstance(command, _POSTCOPY):
                raise PeerError(
                    "the source has switched to postcopy, which cannot be received into a"
                    " checkpoint: let it finish in precopy (no migrate-start-postcopy)"
                )

    def _open_return_path(self) -> None:
        if self._main is None or not self._main.duplex:
            raise PeerError(
                "the source wants a return path, which this transport cannot carry:"
                " use tcp: or unix:, or turn return-path off"
            )
        self._features.add("return-path")
        if self._acknowledges():
            self._answer(SwitchoverAck())

    def _acknowledges(self) -> bool:
        if self._switchover_ack is not None:
            return self._switchover_ack
        configuration = self._reader.configuration
        version = machine_version(configuration.machine) if configuration else None
        return version is not None and version >= (8, 1)

    def _answer(self, message: Message) -> None:
        with self._answering:
            if self._main is None or not self._reader.return_path or self._answered:
                return
            # The source hears one verdict and nothing behind it.
            self._answered = isinstance(message, Shut)
            self._main.send([message.encode()])

    def _refuse(self) -> None:
        """Tell the source that it keeps its machine, as far as it still listens."""
        with suppress(VmferryError):  # the connection may be what broke
            self._answer(Shut(1))

    def _all_features(self) -> frozenset[str]:
        methods = self._connections.methods
        features = set(self._features)
        if methods:
            features.add("multifd")
        features.update(f"multifd-compression={m.name.lower()}" for m in methods - {Method.NONE})
        return frozenset(features)
