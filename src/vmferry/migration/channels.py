"""The receiving end of a multifd channel."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, TypeAlias

import numpy as np

from vmferry.errors import StreamError, TruncatedStream
from vmferry.pages import CONTINUE, PAGE, ZERO, rows_of
from vmferry.pages.compression import Decompressor, Inflate, ZstdExpand
from vmferry.transports import Channel
from vmferry.wire.multifd import PACKET_BYTES, Hello, Method, MultifdReader, Packet
from vmferry.wire.ram import RamBlock, RamPages

from .barrier import SyncBarrier
from .runs import Runs, page_runs

_DECOMPRESSORS: Mapping[Method, Callable[[], Decompressor]] = {
    Method.ZLIB: Inflate,
    Method.ZSTD: ZstdExpand,
}

_RUNS: Final = 8
"""Runs of pages in one packet that are received one by one; more are copied in one go."""

Place: TypeAlias = Callable[[RamBlock, Runs], AbstractContextManager[memoryview]]
"""Lends the memory of a block for the time in which these pages of it are received."""


class PageChannel:
    """One multifd channel of a destination; *head* is what was read from it already.

    *prepare* is called before the first packet is read and returns when guest memory is known.
    Pages are received into what *place* lends, where there is that, or else given to *store*.
    *received* is told how many bytes came.
    """

    def __init__(
        self,
        channel: Channel,
        head: bytes,
        reader: MultifdReader,
        barrier: SyncBarrier,
        *,
        prepare: Callable[[MultifdReader], None],
        store: Callable[[RamPages], None],
        place: Place | None,
        received: Callable[[int], None],
    ) -> None:
        self._channel = channel
        self._reader = reader
        self._barrier = barrier
        self._prepare = prepare
        self._store = store
        self._place = place
        self._scratch: memoryview | None = None
        self._received = received
        self._number = -1
        self._method: Method | None = None
        self._decompressor: Decompressor | None = None
        reader.buffer.room()[: len(head)] = head
        reader.buffer.received(len(head))

    @property
    def method(self) -> Method:
        """How pages came compressed; NONE until some did."""
        return self._method or Method.NONE

    def run(self) -> None:
        """Receive until the peer closes the channel, or the migration was broken off."""
        try:
            self._run()
        finally:
            self._scratch = None  # now, and not when nobody knows of this any more

    def _run(self) -> None:
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
            count = self._channel.recv_into(self._reader.room())
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
            self._check_method(packet)
            if packet.method == Method.NONE:
                self._receive(packet, block)
            else:
                self._store_data(packet, block, self._expand(packet))
        if len(packet.zero):
            words = packet.zero | np.uint64(ZERO | CONTINUE)
            rows = rows_of(words, np.zeros(len(words), np.uint64), 1)
            self._store(RamPages(block, rows, memoryview(b""), size))

    def _store_data(self, packet: Packet, block: RamBlock, data: memoryview) -> None:
        size = self._reader.page_size
        words = packet.normal | np.uint64(PAGE | CONTINUE)
        positions = np.arange(len(words), dtype=np.uint64) * np.uint64(size)
        self._store(RamPages(block, rows_of(words, positions, size), data, size))

    def _receive(self, packet: Packet, block: RamBlock) -> None:
        """Receive pages as they are: to where they belong, or together."""
        size = self._reader.page_size
        runs = page_runs(packet.normal // np.uint64(size))
        if self._place is not None and len(runs) <= _RUNS:
            with self._place(block, runs) as memory:
                self._fill(packet, [memory[first * size : last * size] for first, last in runs])
        else:
            if self._scratch is None:
                # Page by page the kernel copies faster to where pages begin.
                self._scratch = memoryview(mmap.mmap(-1, PACKET_BYTES))
            data = self._scratch[: len(packet.normal) * size]
            self._fill(packet, [data])
            self._store_data(packet, block, data)

    def _fill(self, packet: Packet, targets: Sequence[memoryview]) -> None:
        """Fill *targets* with the payload: what was read with the header, and what comes."""
        payload = memoryview(packet.payload)
        for target in targets:
            here = min(len(payload), len(target))
            target[:here] = payload[:here]
            payload = payload[here:]
            if here == len(target):
                continue
            count = self._channel.fill(target[here:])
            self._received(count)
            self._reader.buffer.bypassed(count)
            if here + count < len(target):
                raise TruncatedStream(
                    "the pages of a packet",
                    f"the end of the input {len(target) - here - count} bytes or more before",
                    offset=self._reader.buffer.offset,
                    advice="the stream was cut off, or its sender failed",
                )

    def _check_method(self, packet: Packet) -> None:
        """A source compresses all pages in the same way."""
        if self._method is None:
            self._method = packet.method
        if packet.method != self._method:
            expected = f"compression {self._method.name.lower()} as before"
            raise StreamError(expected, packet.method.name.lower())

    def _expand(self, packet: Packet) -> memoryview:
        if self._decompressor is None:
            self._decompressor = _DECOMPRESSORS[packet.method]()
        size = len(packet.normal) * self._reader.page_size
        return memoryview(self._decompressor.expand(packet.payload, size))
