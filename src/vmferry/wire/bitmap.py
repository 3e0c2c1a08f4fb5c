"""The `dirty-bitmap` section, version 1: which parts of a disk changed since a backup.

QEMU 2.12 to 8.2 ``migration/block-dirty-bitmap.c``.  A record is a flag byte, the names of node and
bitmap where they differ from the record before, and a body.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from ..errors import LimitExceeded, StreamError
from . import limits
from .buffer import Cursor, Parse, encode_name
from .layout import BitmapFlag

_NAMES = BitmapFlag.BITMAP_NAME | BitmapFlag.NODE_NAME
_ENABLED, _PERSISTENT, _IGNORED = 1, 2, 4


@dataclass(frozen=True, slots=True)
class BitmapRecord(ABC):
    """What every record of a bitmap has: its node and name, and which of them it repeats."""

    node: str
    name: str
    names_sent: BitmapFlag

    @abstractmethod
    def encode(self) -> bytes:
        """The record as on the wire."""

    def _head(self, flags: BitmapFlag) -> bytes:
        out = bytes([flags | self.names_sent])
        if self.names_sent & BitmapFlag.NODE_NAME:
            out += encode_name(self.node)
        if self.names_sent & BitmapFlag.BITMAP_NAME:
            out += encode_name(self.name)
        return out


@dataclass(frozen=True, slots=True)
class BitmapStart(BitmapRecord):
    """A bitmap with one bit for each ``granularity`` bytes of its node."""

    granularity: int
    enabled: bool
    persistent: bool
    ignored: bool = False

    def encode(self) -> bytes:
        """The record as on the wire."""
        flags = self.enabled * _ENABLED | self.persistent * _PERSISTENT | self.ignored * _IGNORED
        return self._head(BitmapFlag.START) + self.granularity.to_bytes(4) + bytes([flags])


@dataclass(frozen=True, slots=True)
class BitmapBits(BitmapRecord):
    """A run of bits: for *sectors* of 512 bytes from *first*; ``data`` is ``None`` where all are 0.

    Bit *i* of the data is bit *i* % 8 of byte *i* // 8, padded with zeros to 32 bytes.
    """

    first: int
    sectors: int
    data: bytes | None

    def encode(self) -> bytes:
        """The record as on the wire."""
        run = self.first.to_bytes(8) + self.sectors.to_bytes(4)
        if self.data is None:
            return self._head(BitmapFlag.BITS | BitmapFlag.ZEROES) + run
        return self._head(BitmapFlag.BITS) + run + len(self.data).to_bytes(8) + self.data


@dataclass(frozen=True, slots=True)
class BitmapComplete(BitmapRecord):
    """The bitmap was sent whole."""

    def encode(self) -> bytes:
        """The record as on the wire."""
        return self._head(BitmapFlag.COMPLETE)


class BitmapsEnd:
    """The end of this section's records."""

    __slots__ = ()

    def encode(self) -> bytes:
        """The record as on the wire."""
        return bytes([BitmapFlag.EOS])


@dataclass(slots=True)
class BitmapReader:
    """Reads the bodies of `dirty-bitmap` sections; remembers the current node and bitmap."""

    started: dict[tuple[str, str], BitmapStart] = field(default_factory=dict)
    _node: str = ""
    _name: str = ""

    def body(self, at: Cursor) -> Parse[None]:
        """Read one body up to and with its end record; yields the events above."""
        while True:
            offset = at.buffer.offset
            flags = BitmapFlag((yield from at.number(1, "a bitmap record")))
            names = flags & _NAMES
            if flags == BitmapFlag.EOS:
                yield BitmapsEnd()
                return
            if names & BitmapFlag.NODE_NAME:
                self._node = yield from at.name("the name of a node")
            if names & BitmapFlag.BITMAP_NAME:
                self._name = yield from at.name("the name of a bitmap")
            if not self._node or not self._name:
                raise at.fail(
                    "the names of node and bitmap in the first record", "none", offset=offset
                )
            try:
                yield (yield from self._record(at, flags & ~_NAMES, names))
            except StreamError as error:
                raise error.within(offset=offset, block=f"{self._node}/{self._name}") from None

    def _record(self, at: Cursor, flags: BitmapFlag, names: BitmapFlag) -> Parse[BitmapRecord]:
        key = (self._node, self._name)
        if flags == BitmapFlag.START:
            start = yield from self._start(at, names)
            if key in self.started:
                raise StreamError("each bitmap started once", "a second start")
            if len(self.started) == limits.BITMAPS:
                raise LimitExceeded(f"at most {limits.BITMAPS} bitmaps", "more")
            self.started[key] = start
            return start
        if flags not in {BitmapFlag.COMPLETE, BitmapFlag.BITS, BitmapFlag.BITS | BitmapFlag.ZEROES}:
            raise StreamError("a bitmap record: start, bits, complete or end", f"{flags:#04x}")
        if key not in self.started:
            raise StreamError("a bitmap that was started", "one that was not")
        if flags == BitmapFlag.COMPLETE:
            return BitmapComplete(*key, names)
        return (yield from self._bits(at, flags, names))

    def _start(self, at: Cursor, names: BitmapFlag) -> Parse[BitmapStart]:
        granularity = yield from at.number(4, "the granularity of a bitmap")
        flags = yield from at.number(1, "the flags of a bitmap")
        if granularity < 512 or granularity & (granularity - 1):
            raise StreamError("a granularity that is a power of two from 512", str(granularity))
        if flags & ~(_ENABLED | _PERSISTENT | _IGNORED):
            raise StreamError("bitmap flags from 0 to 7", f"{flags:#04x}")
        return BitmapStart(
            self._node,
            self._name,
            names,
            granularity,
            bool(flags & _ENABLED),
            bool(flags & _PERSISTENT),
            bool(flags & _IGNORED),
        )

    def _bits(self, at: Cursor, flags: BitmapFlag, names: BitmapFlag) -> Parse[BitmapBits]:
        first = yield from at.number(8, "the first sector of a run of bits")
        sectors = yield from at.number(4, "the sectors of a run of bits")
        if first > (1 << 54) or sectors == 0:
            raise StreamError("one or more sectors below 2^54", f"{sectors} from {first}")
        data = None
        if not flags & BitmapFlag.ZEROES:
            data = yield from self._data(at, sectors)
        return BitmapBits(self._node, self._name, names, first, sectors, data)

    def _data(self, at: Cursor, sectors: int) -> Parse[bytes]:
        size = yield from at.number(8, "the size of a run of bits")
        if size > limits.BITMAP_DATA:
            raise LimitExceeded(f"at most {limits.BITMAP_DATA} bytes of bits", str(size))
        granularity = self.started[self._node, self._name].granularity
        needed = -(-sectors * 512 // granularity) + 7 >> 3
        if size < needed:
            raise StreamError(f"{needed} bytes or more for {sectors} sectors", str(size))
        return (yield from at.take(size, "a run of bits"))
