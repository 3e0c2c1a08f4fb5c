"""Dirty bitmaps: which parts of a disk were changed since somebody asked, as for a backup.

QEMU 7.2 ``block/monitor/bitmap-qmp-cmds.c`` and ``migration/block-dirty-bitmap.c``.  They are kept
in memory, and travel with the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import StreamError, UsageError, printable
from vmferry.images import Image
from vmferry.images.changes import ChangeLog
from vmferry.wire import limits
from vmferry.wire.bitmap import (
    BitmapBits,
    BitmapComplete,
    BitmapRecord,
    BitmapStart,
)
from vmferry.wire.layout import SECTOR, BitmapFlag

from .disks import disk_name

_GRANULARITY: Final = 1 << 16
"""Bytes, where nobody says another (QEMU has the same for raw images)."""

_LARGEST: Final = 1 << 31

_MOST: Final = 1 << 26
"""Bits of all bitmaps together; each takes a byte of memory."""

_RUN: Final = 8192
"""Bits in a record, as QEMU sends them."""

_PADDING: Final = 32

_BOTH: Final = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME
_SAME: Final = BitmapFlag(0)


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """A bitmap of the disk *node*, with a bit for each ``granularity`` bytes."""

    node: str
    name: str
    granularity: int
    size: int
    log: ChangeLog

    @property
    def count(self) -> int:
        """Bytes that were changed, in whole granules."""
        return int(self.log.marks().sum()) * self.granularity

    def start(self) -> BitmapStart:
        """The record that begins it."""
        records, persistent = self.log.records, False
        return BitmapStart(self.node, self.name, _BOTH, self.granularity, records, persistent)

    def bits(self) -> Iterator[BitmapRecord]:
        """Its bits as of now, and the record that ends it."""
        marks, names = self.log.marks(), _BOTH
        for first in range(0, len(marks), _RUN):
            part = marks[first : first + _RUN]
            offset = first * self.granularity
            length = min(len(part) * self.granularity, self.size - offset)
            data = _packed(part) if part.any() else None
            sectors = -(-length // SECTOR)
            yield BitmapBits(self.node, self.name, names, offset // SECTOR, sectors, data)
            names = _SAME
        yield BitmapComplete(self.node, self.name, names)


class DirtyBitmaps:
    """The bitmaps of the disks on *images*; any thread may call.

    They cannot be changed while *is_busy* says so.  Raises :class:`UsageError` for what cannot be
    asked for.
    """

    def __init__(self, images: Sequence[Image], is_busy: Callable[[], bool]) -> None:
        self._images = {disk_name(number): image for number, image in enumerate(images)}
        self._bitmaps: dict[tuple[str, str], DirtyBitmap] = {}
        self._is_busy = is_busy
        self._lock = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether a migration has them."""
        return self._is_busy()

    def __iter__(self) -> Iterator[DirtyBitmap]:
        """All of them, as of now."""
        with self._lock:
            return iter(tuple(self._bitmaps.values()))

    def add(
        self, node: str, name: str, *, granularity: int = _GRANULARITY, disabled: bool = False
    ) -> None:
        """``block-dirty-bitmap-add``: begin to note what is changed, unless it is *disabled*."""
        self._refuse_busy()
        with self._lock:
            self._add(node, name, granularity).log.records = not disabled

    def remove(self, node: str, name: str) -> None:
        """``block-dirty-bitmap-remove``."""
        self._refuse_busy()
        with self._lock:
            self._find(node, name).log.close()
            del self._bitmaps[node, name]

    def clear(self, node: str, name: str) -> None:
        """``block-dirty-bitmap-clear``: nothing counts as changed."""
        self._refuse_busy()
        with self._lock:
            self._find(node, name).log.take()

    def record(self, node: str, name: str, *, on: bool) -> None:
        """``block-dirty-bitmap-enable`` and ``-disable``."""
        self._refuse_busy()
        with self._lock:
            self._find(node, name).log.records = on

    def check(self, node: str, name: str, granularity: int, *, beside: int = 0) -> None:
        """Raise where such a bitmap cannot be added, *beside* so many bits that will be."""
        image = self._images.get(node)
        if image is None:
            raise UsageError(
                f"there is no disk {printable(node)}; there are {', '.join(self._images) or 'none'}"
            )
        if not 1 <= len(name.encode()) <= 255 or not name.isprintable():
            raise UsageError(f"a bitmap's name has 1 to 255 printable bytes, not {printable(name)}")
        if (node, name) in self._bitmaps:
            raise UsageError(f"{node} has a bitmap {printable(name)} already")
        if not SECTOR <= granularity <= _LARGEST or granularity & (granularity - 1):
            raise UsageError(
                f"granularity is a power of two from {SECTOR} to {_LARGEST}, not {granularity}"
            )
        bits = beside + -(-image.size // granularity)
        bits += sum(-(-one.size // one.granularity) for one in self._bitmaps.values())
        if len(self._bitmaps) >= limits.BITMAPS or bits > _MOST:
            raise UsageError(
                f"there is no room for a bitmap {printable(name)}: at most {limits.BITMAPS}, with"
                f" {_MOST} bits together; choose a larger granularity"
            )

    def size(self, node: str) -> int:
        """Bytes of a disk."""
        return self._images[node].size

    def bring(self, start: BitmapStart, marks: npt.NDArray[np.uint8]) -> None:
        """Add one that has come with the machine."""
        with self._lock:
            log = self._add(start.node, start.name, start.granularity).log
            log.merge(marks)
            log.records = start.enabled

    def _add(self, node: str, name: str, granularity: int) -> DirtyBitmap:
        self.check(node, name, granularity)
        image = self._images[node]
        log = image.log_changes(granularity, own=True)
        bitmap = DirtyBitmap(node, name, granularity, image.size, log)
        self._bitmaps[node, name] = bitmap
        return bitmap

    def _find(self, node: str, name: str) -> DirtyBitmap:
        bitmap = self._bitmaps.get((node, name))
        if bitmap is None:
            raise UsageError(f"there is no bitmap {printable(name)} of a disk {printable(node)}")
        return bitmap

    def _refuse_busy(self) -> None:
        if self._is_busy():
            raise UsageError("dirty bitmaps cannot be changed while they are migrated")


class IncomingBitmaps:
    """Takes the records of bitmaps that come with a machine; they are *bitmaps* at the end.

    Before that nothing has changed.  What cannot be is refused as the stream's error.
    """

    def __init__(self, bitmaps: DirtyBitmaps) -> None:
        self._bitmaps = bitmaps
        self._came: dict[tuple[str, str], tuple[BitmapStart, npt.NDArray[np.uint8]]] = {}
        self._complete: set[tuple[str, str]] = set()

    def take(self, record: BitmapRecord) -> None:
        """Take a piece of one."""
        key = record.node, record.name
        match record:
            case BitmapStart():
                self._start(record)
            case BitmapBits():
                self._bits(record, *self._came[key])
            case BitmapComplete():
                self._complete.add(key)

    def finish(self) -> None:
        """Everything has come."""
        for key, (start, _) in self._came.items():
            if key not in self._complete:
                raise StreamError("all bits of each bitmap", "only some", block=start.name)
        for start, marks in self._came.values():
            self._bitmaps.bring(start, marks)

    def _start(self, start: BitmapStart) -> None:
        if start.persistent:
            expected = "bitmaps that are kept in memory"
            raise StreamError(expected, "a persistent one", block=start.name)
        beside = sum(len(marks) for _, marks in self._came.values())
        try:
            self._bitmaps.check(start.node, start.name, start.granularity, beside=beside)
        except UsageError as error:
            raise StreamError(
                "a dirty bitmap that this machine can have", str(error), section="dirty-bitmap"
            ) from error
        bits = -(-self._bitmaps.size(start.node) // start.granularity)
        self._came[start.node, start.name] = start, np.zeros(bits, np.uint8)

    def _bits(self, record: BitmapBits, start: BitmapStart, marks: npt.NDArray[np.uint8]) -> None:
        end = (record.first + record.sectors) * SECTOR
        size = -(-self._bitmaps.size(start.node) // SECTOR) * SECTOR
        if end > size:
            raise StreamError(
                f"bits of {start.node}, which has {size} bytes here",
                f"those up to byte {end}",
                section="dirty-bitmap",
                block=start.name,
            )
        if record.data is not None:
            first = record.first * SECTOR // start.granularity
            last = -(-end // start.granularity)
            raw = np.frombuffer(record.data, np.uint8)
            marks[first:last] = np.unpackbits(raw, count=last - first, bitorder="little")


def _packed(marks: npt.NDArray[np.uint8]) -> bytes:
    data = np.packbits(marks, bitorder="little").tobytes()
    return data + bytes(-len(data) % _PADDING)
