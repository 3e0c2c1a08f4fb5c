"""The `dirty-bitmap` section, version 1: which parts of a disk changed since a backup.

QEMU 2.12 to 8.2 ``migration/block-dirty-bitmap.c``.  A record is a flag byte, the names of node and
bitmap where they differ from the record before, and a body.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Final

from vmferry.errors import LimitExceeded, StreamError

from . import limits
from .buffer import Cursor, Parse, either, encode_name, within
from .layout import SECTOR, BitmapFlag

_NAMES: Final = BitmapFlag.BITMAP_NAME | BitmapFlag.NODE_NAME
_KINDS: Final = frozenset(
    (
        BitmapFlag.START,
        BitmapFlag.COMPLETE,
        BitmapFlag.BITS,
        BitmapFlag.BITS | BitmapFlag.ZEROES,
    )
)
_ENABLED, _PERSISTENT, _IGNORED = 1, 2, 4
_SECTORS: Final = 1 << 54
_PADDING: Final = 32
"""A source fills up the bits of a record to a multiple of so many bytes."""


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


@dataclass(frozen=True, slots=True)
class BitmapsEnd:
    """The end of this section's records."""

    def encode(self) -> bytes:
        """The record as on the wire."""
        return bytes([BitmapFlag.EOS])


@dataclass(slots=True)
class BitmapReader:
    """Reads the bodies of `dirty-bitmap` sections; remembers the current node and bitmap."""

    started: dict[tuple[str, str], BitmapStart] = field(default_factory=dict)
    _complete: set[tuple[str, str]] = field(default_factory=set)
    _node: str = ""
    _name: str = ""

    def body(self, at: Cursor) -> Parse[None]:
        """Read one body up to and with its end record; yields the events above."""
        while True:
            offset = at.buffer.offset
            flags = BitmapFlag((yield from at.number(1, "a bitmap record")))
            if flags == BitmapFlag.EOS:
                yield BitmapsEnd()
                return
            if flags & ~_NAMES not in _KINDS:
                raise at.fail(
                    "a bitmap record: start, bits, complete or end", f"{flags:#04x}", offset=offset
                )
            yield from within(self._named(at, flags), offset=offset)

    def _named(self, at: Cursor, flags: BitmapFlag) -> Parse[None]:
        if not (self._node or flags & BitmapFlag.NODE_NAME) or not (
            self._name or flags & BitmapFlag.BITMAP_NAME
        ):
            raise StreamError("the names of node and bitmap in the first record", "none")
        if flags & BitmapFlag.NODE_NAME:
            self._node = yield from at.name("the name of a node")
        if flags & BitmapFlag.BITMAP_NAME:
            self._name = yield from at.name("the name of a bitmap")
        record = self._record(at, flags & ~_NAMES, flags & _NAMES)
        yield (yield from within(record, block=f"{self._node}/{self._name}"))

    def _record(self, at: Cursor, kind: BitmapFlag, names: BitmapFlag) -> Parse[BitmapRecord]:
        key = (self._node, self._name)
        if kind == BitmapFlag.START:
            if key in self.started:
                raise StreamError("each bitmap started once", "a second start")
            if len(self.started) == limits.BITMAPS:
                raise LimitExceeded(f"at most {limits.BITMAPS} bitmaps", "more")
            start = self.started[key] = yield from self._start(at, names)
            return start
        if key not in self.started:
            raise StreamError("a bitmap that was started", "one that was not")
        if key in self._complete:
            raise StreamError("records of a bitmap before it was complete", "one behind that")
        if kind == BitmapFlag.COMPLETE:
            self._complete.add(key)
            return BitmapComplete(*key, names)
        return (yield from self._bits(at, kind, names))

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

    def _bits(self, at: Cursor, kind: BitmapFlag, names: BitmapFlag) -> Parse[BitmapBits]:
        granularity = self.started[self._node, self._name].granularity
        first = yield from at.number(8, "the first sector of a run of bits")
        sectors = yield from at.number(4, "the sectors of a run of bits")
        if first > _SECTORS or not 0 < sectors <= _SECTORS - first:
            raise StreamError("one or more sectors below 2^54", f"{sectors} sectors from {first}")
        if first % (granularity // SECTOR):
            raise StreamError(f"a multiple of {granularity // SECTOR} sectors", str(first))
        data = None
        if not kind & BitmapFlag.ZEROES:
            bits = -(-sectors * SECTOR // granularity)
            data = yield from self._data(at, sectors, -(-bits // 8))
        return BitmapBits(self._node, self._name, names, first, sectors, data)

    def _data(self, at: Cursor, sectors: int, least: int) -> Parse[bytes]:
        size = yield from at.number(8, "the size of a run of bits")
        if size > limits.BITMAP_DATA:
            raise LimitExceeded(f"at most {limits.BITMAP_DATA} bytes of bits", str(size))
        most = -(-least // _PADDING) * _PADDING
        if not least <= size <= most:
            allowed = either(range(least, most + 1))
            raise StreamError(f"{allowed} bytes of bits for {sectors} sectors", str(size))
        return (yield from at.take(size, "a run of bits"))
