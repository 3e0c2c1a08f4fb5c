"""The content of disks as a source sends it: all of it once, then what was written meanwhile.

QEMU 7.2 ``migration/block.c``.  Disks move in chunks of 1 MiB, before guest memory and between its
rounds; the last of them when the machine has been stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final, TypeAlias

import numpy as np

from vmferry.images import Image
from vmferry.images.changes import CHUNK, ChangeLog
from vmferry.images.filling import has_data
from vmferry.pages import zero_pages
from vmferry.wire.disk import DiskChunk, DiskProgress
from vmferry.wire.layout import DISK_CHUNK_SIZE, SECTOR

from .outgoing import PageStore

assert CHUNK == DISK_CHUNK_SIZE  # noqa: S101 - what is logged is what is sent

Record: TypeAlias = DiskChunk | DiskProgress

_SECTORS: Final = CHUNK // SECTOR
_WHOLE: Final = np.zeros(1, np.uint64)
_ZEROES: Final = memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS)).toreadonly()


def disk_name(number: int) -> str:
    """What the disk on a machine's image *number* is called, in the stream and by operators."""
    return f"disk{number}"


def all_of(disks: Sequence[tuple[str, PageStore]]) -> Iterator[Record]:
    """The chunks of disks at rest."""
    buffer = memoryview(bytearray(CHUNK))
    for name, store in disks:
        for number, content in enumerate(store.sums):
            data = buffer if content else None
            if data is not None:
                store.read(number * CHUNK, data)
            yield DiskChunk(name, number * _SECTORS, data)


@dataclass(frozen=True, slots=True)
class _Disk:
    name: str
    image: Image
    log: ChangeLog

    @property
    def chunks(self) -> int:
        return -(-self.image.size // CHUNK)

    def length(self, number: int) -> int:
        """Bytes of a chunk that are on the disk."""
        return min(CHUNK, self.image.size - number * CHUNK)


class LiveDisks:
    """The disks of a machine that runs, on those of *images* that can be written.

    Their changes are logged from now on, until *cleanup*.  With *zeroes* a chunk of zeroes is sent
    as such, which takes 20 bytes, else whole.  *incremental*: chunks in which an image has nothing
    itself are not sent, as the other side has the same backing file.  Numbers are bytes of disks:
    ``total``, and ``done`` of what was sent, where a chunk counts as often as it is sent.
    """

    def __init__(
        self,
        images: Sequence[Image],
        cleanup: ExitStack,
        *,
        zeroes: bool,
        incremental: bool = False,
    ) -> None:
        self._disks = [
            _Disk(disk_name(number), image, cleanup.enter_context(image.log_changes()))
            for number, image in enumerate(images)
            if image.size and not image.read_only
        ]
        self._zeroes = zeroes
        self._incremental = incremental
        self._buffer = memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS))
        self.total = self._left = sum(disk.image.size for disk in self._disks)
        self.done = 0

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._disks)

    @property
    def remaining(self) -> int:
        """Bytes that are known to be unsent."""
        return self._left + sum(disk.log.pending for disk in self._disks)

    def chunks(self) -> Iterator[Record]:
        """What is to be sent now: everything at first, then what was written since.

        The data of a chunk is right until the next one is asked for.
        """
        if self._left:
            yield from self._everything()
        else:
            for disk in self._disks:
                for number in disk.log.take():
                    yield self._chunk(disk, number)

    def _everything(self) -> Iterator[Record]:
        percent = -1
        for disk in self._disks:
            # Where the other side's image is too small, this is what shows it at once.
            last = disk.chunks - 1
            yield self._counted(disk, last, has_data=True)
            for number, is_data in enumerate(has_data(disk.image, own=self._incremental)):
                if number < last:
                    if is_data or not self._incremental:
                        yield self._counted(disk, number, has_data=is_data)
                    else:
                        self._left -= CHUNK
                    if percent != (percent := 100 - 100 * self._left // self.total):
                        yield DiskProgress(percent)

    def _counted(self, disk: _Disk, number: int, *, has_data: bool) -> Record:
        self._left -= disk.length(number)
        return self._chunk(disk, number, has_data=has_data)

    def _chunk(self, disk: _Disk, number: int, *, has_data: bool = True) -> DiskChunk:
        length = disk.length(number)
        self.done += length
        data = _ZEROES
        if has_data:
            data = self._buffer
            disk.image.read(number * CHUNK, data[:length])
            data[length:] = _ZEROES[length:]
        if self._zeroes and (not has_data or _is_zero(data)):
            return DiskChunk(disk.name, number * _SECTORS, None)
        return DiskChunk(disk.name, number * _SECTORS, data)


def _is_zero(data: memoryview) -> bool:
    return bool(zero_pages(data, _WHOLE, CHUNK, np.empty(1, np.uint8)))
