"""The `block` section, version 1: disks moved inside the migration.

QEMU 2.6 to 9.0 ``migration/block.c``.  Every record starts with a big-endian 64-bit word: a sector
of 512 bytes in the upper 55 bits, flags in the lower 9.  Disks move in chunks of 1 MiB; the last
chunk of a disk is sent whole too, whatever the size of the disk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from vmferry.errors import LimitExceeded

from . import limits
from .buffer import Cursor, Parse, encode_name
from .layout import DISK_CHUNK, DISK_CHUNK_SIZE, DISK_END, DISK_PROGRESS, DISK_ZERO, SECTOR

_FLAG_BITS: Final = 9
_MAX_SECTOR: Final = (1 << 63) // SECTOR


@dataclass(frozen=True, slots=True)
class DiskChunk:
    """1 MiB of a disk, at ``sector`` (a multiple of 2048); ``data`` is ``None`` for zeros.

    ``data`` lends the reader's buffer.  Of a disk's last chunk only what is on the disk counts.
    """

    disk: str
    sector: int
    data: memoryview | bytes | None

    @property
    def offset(self) -> int:
        """Where the chunk starts, in bytes."""
        return self.sector * SECTOR

    def encode(self) -> bytes:
        """The record as on the wire."""
        return b"".join(self.parts())

    def parts(self) -> list[memoryview | bytes]:
        """As :meth:`encode`, without a copy of the data."""
        flags = DISK_CHUNK if self.data is not None else DISK_CHUNK | DISK_ZERO
        head = _word(self.sector, flags) + encode_name(self.disk)
        return [head] if self.data is None else [head, self.data]


@dataclass(frozen=True, slots=True)
class DiskProgress:
    """How much of the bulk pass is done, in percent."""

    percent: int

    def encode(self) -> bytes:
        """The record as on the wire."""
        return _word(self.percent, DISK_PROGRESS)


@dataclass(frozen=True, slots=True)
class DiskEnd:
    """The end of this section's records."""

    def encode(self) -> bytes:
        """The record as on the wire."""
        return _word(0, DISK_END)


def _word(upper: int, flags: int) -> bytes:
    return (upper << _FLAG_BITS | flags).to_bytes(8)


@dataclass(slots=True)
class DiskReader:
    """Reads the bodies of `block` sections; remembers the names of the disks."""

    disks: set[str] = field(default_factory=set)

    def body(self, at: Cursor) -> Parse[None]:
        """Read one body up to and with its end record; yields the events above."""
        while True:
            offset = at.buffer.offset
            word = yield from at.number(8, "a disk record")
            upper, flags = word >> _FLAG_BITS, word & (1 << _FLAG_BITS) - 1
            match flags:
                case 0x01 | 0x09:
                    yield (yield from self._chunk(at, upper, flags, offset))
                case 0x02 if upper == 0:
                    yield DiskEnd()
                    return
                case 0x04 if upper <= 100:
                    yield DiskProgress(upper)
                case _:
                    raise at.fail(
                        "a disk record: chunk, zero chunk, progress of at most 100 %, or end",
                        f"the word {word:#018x}",
                        offset=offset,
                    )

    def _chunk(self, at: Cursor, sector: int, flags: int, offset: int) -> Parse[DiskChunk]:
        disk = yield from at.name("the name of a disk")
        if sector % (DISK_CHUNK_SIZE // SECTOR) or sector >= _MAX_SECTOR:
            raise at.fail(
                "a sector that is a multiple of 2048 on a disk below 8 EiB",
                f"sector {sector}",
                offset=offset,
                block=disk,
            )
        self.disks.add(disk)
        if len(self.disks) > limits.DISKS:
            raise LimitExceeded(f"at most {limits.DISKS} disks", "more", offset=offset)
        if flags & DISK_ZERO:
            return DiskChunk(disk, sector, None)
        yield from at.need(DISK_CHUNK_SIZE, "a chunk of a disk")
        data = at.buffer.peek(DISK_CHUNK_SIZE)
        at.buffer.advance(DISK_CHUNK_SIZE)
        return DiskChunk(disk, sector, data)
