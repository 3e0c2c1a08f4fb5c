"""The receiving end of a multifd channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vmferry.errors import StreamError
from vmferry.pages import CONTINUE, PAGE, ZERO, rows_of
from vmferry.pages.compression import Decompressor, Inflate, Plain, ZstdExpand
from vmferry.transports import Channel
from vmferry.wire.multifd import Hello, Method, MultifdReader, Packet
from vmferry.wire.ram import RamBlock, RamPages

from .barrier import SyncBarrier

_DECOMPRESSORS: Mapping[Method, Callable[[], Decompressor]] = {
    Method.NONE: Plain,
    Method.ZLIB: Inflate,
    Method.ZSTD: ZstdExpand,
}


class PageChannel:
    """One multifd channel of a destination; *head* is what was read from it already.

    *prepare* is called before the first packet is read and returns when guest memory is known.
    *received* is told how many bytes came.
    """

    def __init__(
        self,
        channel: Channel,
        head: bytes,
        reader: MultifdReader,
        barrier: SyncBarrier,
        prepare: Callable[[MultifdReader], None],
        store: Callable[[RamPages], None],
        received: Callable[[int], None],
    ) -> None:
        self._channel = channel
        self._reader = reader
        self._barrier = barrier
        self._prepare = prepare
        self._store = store
        self._received = received
        self._number = -1
        self._method = Method.NONE
        self._decompressor: Decompressor | None = None
        reader.buffer.room()[: len(head)] = head
        reader.buffer.received(len(head))

    @property
    def method(self) -> Method:
        """How pages came compressed; NONE until some did."""
        return self._method

    def run(self) -> None:
        """Receive until the peer closes the channel, or the migration was broken off."""
        buffer = self._reader.buffer
        self._received(len(buffer))
        while True:
            for event in self._reader.events():
                if isinstance(event, Hello):
                    self._join(event)
                elif not self._take(event):
                    return
            if buffer.ended:
                self._barrier.leave(self._number)
                return
            count = self._channel.recv_into(buffer.room())
            buffer.received(count)
            self._received(count)

    def _join(self, hello: Hello) -> None:
        self._number = hello.channel
        self._reader.channel = self._channel.name = f"multifd {hello.channel}"
        if not self._barrier.join(hello.channel):
            raise StreamError(
                "each multifd channel once",
                f"channel {hello.channel} again",
                channel=self._reader.channel,
                offset=0,
            )
        self._prepare(self._reader)

    def _take(self, packet: Packet) -> bool:
        """Store a packet's pages and synchronise; false where there is no more to do."""
        if packet.block is not None:
            try:
                self._barrier.begin(self._number)
                self._store_pages(packet, packet.block)
            except StreamError as error:
                raise error.within(channel=self._reader.channel, offset=packet.offset) from None
        return not packet.sync or self._barrier.deliver(self._number)

    def _store_pages(self, packet: Packet, block: RamBlock) -> None:
        size = self._reader.page_size
        if len(packet.normal):
            data = self._expand(packet)
            words = packet.normal | np.uint64(PAGE | CONTINUE)
            positions = np.arange(len(words), dtype=np.uint64) * np.uint64(size)
            rows = rows_of(words, positions, size)
            self._store(RamPages(block, rows, memoryview(data), size))
        if len(packet.zero):
            words = packet.zero | np.uint64(ZERO | CONTINUE)
            rows = rows_of(words, np.zeros(len(words), np.uint64), 1)
            self._store(RamPages(block, rows, memoryview(b""), size))

    def _expand(self, packet: Packet) -> bytes | memoryview:
        if self._decompressor is None:
            self._method = packet.method
            self._decompressor = _DECOMPRESSORS[packet.method]()
        if packet.method != self._method:
            expected = f"compression {self._method.name.lower()} as before"
            raise StreamError(expected, packet.method.name.lower())
        size = len(packet.normal) * self._reader.page_size
        return self._decompressor.expand(packet.payload, size)
