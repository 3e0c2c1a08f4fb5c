"""The sending end of multifd: pages with content go through channels of their own.

QEMU 7.2 ``migration/multifd.c``.  Zero pages stay on the main channel.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from vmferry.pages.compression import Compressor, Deflate, Plain, ZstdPack
from vmferry.transports import Channel
from vmferry.wire.multifd import PACKET_BYTES, Hello, Method, encode_header, pages_per_packet
from vmferry.wire.ram import RamBlock

from .outgoing import PageStore
from .progress import Meter
from .runs import page_runs

_COMPRESSORS: Final[Mapping[Method, Callable[[int], Compressor]]] = {
    Method.NONE: lambda _level: Plain(),
    Method.ZLIB: Deflate,
    Method.ZSTD: ZstdPack,
}


_RUNS: Final = 8
"""Runs of pages in one packet that are each sent from the file: more are copied together first."""

_PACKETS: Final = 4
"""Packets that a channel takes at once where they cost little: with them the memory of a region."""

Numbers = npt.NDArray[np.uint64]

Payload = Callable[[Numbers, memoryview], memoryview]
"""The content of some pages, one behind the other, perhaps in the buffer that is given; called by
the threads of channels."""


@dataclass(frozen=True, slots=True)
class _Job:
    """Pages of a block, by number and ascending.

    ``file`` is a descriptor that has the content of the block, or ``None``.
    """

    block: RamBlock
    pages: Numbers
    payload: Payload
    file: int | None


class PageSender:
    """Sends pages over *channels*, each served by a thread.

    Whatever goes wrong on a channel is raised by the next call, also that its other side reads
    nothing for *idle* seconds.  *by_reference* says that files may be sent from as they are: they
    do not change before the other side has said that it has everything, or what it has does not
    count.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        *,
        page_size: int,
        method: Method,
        level: int,
        uuid: UUID,
        meter: Meter,
        idle: float | None,
        by_reference: bool = False,
    ) -> None:
        self._channels = channels
        self._by_reference = by_reference and method == Method.NONE
        self._step = pages_per_packet(page_size)
        self._idle = idle
        self._page_size = page_size
        self._method = method
        self._meter = meter
        self._numbers = itertools.count(1)
        self._jobs: queue.Queue[_Job | None] = queue.Queue(2 * len(channels))
        self._failure: BaseException | None = None
        for number, channel in enumerate(channels):
            channel.name = f"multifd {number}"
            channel.send([Hello(uuid, number).encode()], idle)
        self._threads: list[threading.Thread] = []
        with ExitStack() as undo:
            undo.callback(self.close)
            for channel in channels:
                work = (channel, _COMPRESSORS[method](level))
                thread = threading.Thread(target=self._run, args=work, daemon=True)
                thread.name = channel.name
                thread.start()
                self._threads.append(thread)
            undo.pop_all()

    def send_block(self, block: RamBlock, store: PageStore) -> None:
        """Queue all pages of the block that have content."""
        step = pages_per_packet(self._page_size)
        for first in range(0, len(store.sums), step):
            pages = np.flatnonzero(store.sums[first : first + step]) + first
            if len(pages):
                self.send(block, pages.astype(np.uint64), partial(_stored, store, self._page_size))

    def send(
        self, block: RamBlock, pages: Numbers, payload: Payload, file: int | None = None
    ) -> None:
        """Queue pages of a block, by number and ascending.

        *file* is a descriptor that has the content of the block, if there is one.
        """
        step = self._step * (_PACKETS if self._by_reference else 1)
        for first in range(0, len(pages), step):
            self._check()
            self._jobs.put(_Job(block, pages[first : first + step], payload, file))

    def synchronise(self) -> None:
        """Send what is queued, then a synchronisation on every channel."""
        self._jobs.join()
        self._check()
        for channel in self._channels:
            header = self._header(None, np.zeros(0, np.uint64), 0, sync=True)
            channel.send([header], self._idle)
            self._meter.count(transferred=len(header), multifd=len(header))

    def close(self) -> None:
        """End the threads; the channels belong to the caller.

        After a failure they must be shut down before, or this may wait as long as a send does.
        """
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, channel: Channel, compressor: Compressor) -> None:
        buffer = memoryview(bytearray(PACKET_BYTES))
        while (job := self._jobs.get()) is not None:
            try:
                # After a failure the queue is emptied for nothing, so that nobody waits on it.
                if self._failure is None:
                    self._send(channel, job, compressor, buffer)
            except Exception as error:  # noqa: BLE001 - raised by the next call of the owner
                self._failure = self._failure or error  # the others follow from the first
                # One that is blocked would have the owner wait for what it was given.
                for other in self._channels:
                    other.shutdown()
            finally:
                self._jobs.task_done()
        self._jobs.task_done()

    def _send(
        self, channel: Channel, job: _Job, compressor: Compressor, buffer: memoryview
    ) -> None:
        for first in range(0, len(job.pages), self._step):
            pages = job.pages[first : first + self._step]
            offsets = pages * np.uint64(self._page_size)
            runs = page_runs(pages) if self._by_reference and job.file is not None else ()
            if job.file is not None and 0 < len(runs) <= _RUNS:
                size = len(pages) * self._page_size
                header = self._header(job.block, offsets, size)
                head = header
                for start, end in runs:
                    place, count = start * self._page_size, (end - start) * self._page_size
                    channel.send_file(head, job.file, place, count, self._idle)
                    head = b""
            else:
                content = job.payload(pages, buffer)
                payload = content if self._method == Method.NONE else compressor.pack(content)
                size = len(payload)
                header = self._header(job.block, offsets, size)
                channel.send([header, payload], self._idle)
            sent = len(header) + size
            self._meter.count(transferred=sent, multifd=sent, normal=len(pages))
            self._meter.tick()

    def _header(
        self,
        block: RamBlock | None,
        offsets: npt.NDArray[np.uint64],
        size: int,
        *,
        sync: bool = False,
    ) -> bytes:
        return encode_header(
            block,
            offsets,
            payload_size=size,
            number=next(self._numbers),
            page_size=self._page_size,
            method=self._method,
            sync=sync,
        )


def _stored(store: PageStore, size: int, pages: Numbers, buffer: memoryview) -> memoryview:
    """Read pages of a store, with those between them."""
    first, last = int(pages[0]), int(pages[-1])
    span = buffer[: (last - first + 1) * size]
    store.read(first * size, span)
    if len(pages) * size == len(span):
        return span
    chosen = np.frombuffer(span, np.uint8).reshape(-1, size)[pages - np.uint64(first)]
    return memoryview(chosen).cast("B")
