"""multifd: pages on channels of their own.

QEMU 4.0 to 8.2 ``migration/multifd.c``; zero pages in packets from 9.0 on.  A channel sends one
initial packet of 64 bytes, then packets: a header of full length whatever it holds, and a payload.
Empty packets repeat name, sizes and offsets of an older packet: only counts and flags are believed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from vmferry.errors import LimitExceeded, printable

from . import limits
from .buffer import ChannelReader, Cursor, Parse
from .ram import RamBlock

MAGIC: Final = bytes.fromhex("11223344")
VERSION: Final = 1
PACKET_BYTES: Final = 512 << 10
"""Bytes of pages in one packet at the most, whatever the size of a page."""

_INITIAL: Final = 64
_HEADER: Final = struct.Struct(">4sIIIIIQI28x256s")
"""Magic, version, flags, entries of the table, pages with content, bytes of payload, number of the
packet, zero pages, and the name of the block; the table of offsets follows."""
_FIXED: Final = _HEADER.size
_SYNC: Final = 1
_METHOD_MASK: Final = 0x1FFFF << 1
_DEVICE_STATE: Final = 32 << 1


class Method(IntEnum):
    """How the pages of a packet are compressed."""

    NONE = 0
    ZLIB = 1 << 1
    ZSTD = 2 << 1
    QPL = 4 << 1
    UADK = 8 << 1
    QATZIP = 16 << 1


READABLE: Final = frozenset({Method.NONE, Method.ZLIB, Method.ZSTD})
"""Methods that work without special hardware."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The initial packet: which machine, and which of its channels.

    ``uuid`` is all zeros for a machine started without one.
    """

    uuid: UUID
    channel: int

    def encode(self) -> bytes:
        """The packet as on the wire."""
        head = MAGIC + VERSION.to_bytes(4) + self.uuid.bytes + bytes([self.channel])
        return head.ljust(_INITIAL, b"\0")


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """A packet of pages of one RAM block, or a mere synchronisation.

    ``normal`` are the offsets of pages whose content is in ``payload`` in that order, compressed by
    ``method``; ``zero`` those of zero pages (QEMU 9.0), which have no payload.  ``block`` is
    ``None`` where there is no page.  ``payload`` lends the reader's buffer, and ``missing`` bytes
    of it are still to come; ``offset`` is the packet's place in its channel.
    """

    header: bytes
    payload: memoryview | bytes
    sync: bool
    method: Method
    block: RamBlock | None
    normal: npt.NDArray[np.uint64]
    zero: npt.NDArray[np.uint64]
    offset: int = 0
    missing: int = 0

    def encode(self) -> bytes:
        """The packet as on the wire."""
        return self.header + bytes(self.payload)


def pages_per_packet(page_size: int) -> int:
    """Entries in the table of offsets."""
    return PACKET_BYTES // page_size


def encode_header(
    block: RamBlock | None,
    normal: npt.NDArray[np.uint64],
    *,
    payload_size: int,
    number: int,
    page_size: int,
    method: Method = Method.NONE,
    sync: bool = False,
) -> bytes:
    """The header of a packet in the layout of QEMU 4.0 to 8.2."""
    entries = pages_per_packet(page_size)
    flags = method | (_SYNC if sync else 0)
    name = block.name.encode("utf-8") if block is not None else b""
    head = _HEADER.pack(MAGIC, VERSION, flags, entries, len(normal), payload_size, number, 0, name)
    return head + normal.astype(">u8").tobytes().ljust(8 * entries, b"\0")


class MultifdReader(ChannelReader[Hello | Packet]):
    """Reads one multifd channel.

    *blocks* are the machine's RAM blocks by name and may be filled in later than the first packet
    is read, which is a synchronisation.

    With *bypass* a packet whose pages are not compressed is told as soon as its header is there.
    Whoever takes it receives what is missing, tells ``buffer.bypassed``, and then goes on.
    """

    def __init__(
        self,
        blocks: Mapping[str, RamBlock],
        *,
        page_size: int = 4096,
        channel: str = "multifd",
        bypass: bool = False,
    ) -> None:
        super().__init__(channel, 2 << 20)
        self.page_size = page_size
        self._blocks = blocks
        self._bypass = bypass

    def room(self) -> memoryview:
        """Where to receive what comes next: with *bypass* a header, and not what follows it."""
        room = self.buffer.room()
        left = self._header_size - len(self.buffer)
        return room[:left] if self._bypass and left > 0 else room

    @property
    def _header_size(self) -> int:
        return _FIXED + 8 * pages_per_packet(self.page_size)

    def _parse(self) -> Parse[None]:
        yield (yield from _hello(self._at))
        while (yield from self._at.more()):
            yield (yield from self._packet(self._at))

    def _packet(self, at: Cursor) -> Parse[Packet]:
        yield from _magic(at, "a packet")
        size = self._header_size
        yield from at.need(size, "the header of a packet")
        header = bytes(at.buffer.peek(size))
        _, _, flags, _, *counts, name = _HEADER.unpack_from(header)
        method = self._method(at, flags, counts[0])
        normal, zero, payload_size = self._counts(at, counts, method)
        block = self._block(at, name) if normal or zero else None
        offsets = np.frombuffer(header, ">u8", normal + zero, _FIXED).astype(np.uint64)
        if block is not None:
            self._check_offsets(at, block, offsets)
        if not (self._bypass and method == Method.NONE):
            yield from at.need(size + payload_size, "the pages of a packet")
        here = min(len(at.buffer) - size, payload_size)
        packet = Packet(
            header,
            at.buffer.peek(size + here)[size:],
            bool(flags & _SYNC),
            method,
            block,
            offsets[:normal],
            offsets[normal:],
            at.buffer.offset,
            payload_size - here,
        )
        at.buffer.advance(size + here)
        return packet

    def _method(self, at: Cursor, flags: int, normal: int) -> Method:
        method = flags & _METHOD_MASK
        if flags & ~(_METHOD_MASK | _SYNC):
            raise at.fail("flags of a packet: sync and a compression", f"{flags:#x}")
        if method & _DEVICE_STATE:
            raise at.fail("a packet of pages", "one of device state (QEMU 10.0)")
        # What an empty packet says of its compression is left over from an older one.
        if normal and method not in READABLE:
            known = Method(method).name.lower() if method in set(Method) else f"number {method:#x}"
            raise at.fail("pages plain or compressed by zlib or zstd", f"compression {known}")
        return Method(method) if normal else Method.NONE

    def _counts(self, at: Cursor, counts: Sequence[int], method: Method) -> tuple[int, int, int]:
        """Pages with content, zero pages, and bytes of payload."""
        normal, size, _, zero = counts
        most = pages_per_packet(self.page_size)
        if normal > most or zero > most - normal:
            raise at.fail(f"at most {most} pages in a packet", f"{normal} and {zero} zero pages")
        if normal == 0:
            return 0, zero, 0
        if method == Method.NONE and size != normal * self.page_size:
            raise at.fail(f"{normal * self.page_size} bytes for {normal} pages", str(size))
        if not 1 <= size <= limits.MULTIFD_PAYLOAD:
            raise LimitExceeded(
                f"a payload of 1 to {limits.MULTIFD_PAYLOAD} bytes",
                str(size),
                offset=at.buffer.offset,
            )
        return normal, zero, size

    def _block(self, at: Cursor, name: bytes) -> RamBlock:
        name = name.split(b"\0", 1)[0]
        block = self._blocks.get(name.decode("utf-8", "surrogateescape"))
        if block is None:
            raise at.fail("the name of a RAM block of the main channel", printable(name))
        return block

    def _check_offsets(self, at: Cursor, block: RamBlock, offsets: npt.NDArray[np.uint64]) -> None:
        last = block.length - self.page_size
        bits = int(np.bitwise_or.reduce(offsets))
        if int(offsets.max()) <= last and not bits & (self.page_size - 1):
            return
        wrong = (offsets > np.uint64(max(last, 0))) | (offsets % np.uint64(self.page_size) != 0)
        raise at.fail(
            f"offsets of pages of {self.page_size} bytes up to {last:#x}",
            f"{int(offsets[wrong][0]):#x}" if wrong.any() else "a block of less than a page",
            block=block.name,
        )


def _number(header: bytes, position: int) -> int:
    return int.from_bytes(header[position : position + 4])


def _magic(at: Cursor, what: str) -> Parse[None]:
    yield from at.need(8, what)
    head = bytes(at.buffer.peek(8))
    if head[:4] != MAGIC or _number(head, 4) != VERSION:
        raise at.fail(
            f"{what} with magic {MAGIC.hex()} and version {VERSION}",
            f"{head[:4].hex()} and {_number(head, 4)}",
        )


def _hello(at: Cursor) -> Parse[Hello]:
    yield from _magic(at, "an initial packet")
    offset = at.buffer.offset
    raw = yield from at.take(_INITIAL, "an initial packet")
    if any(raw[25:]):
        raise at.fail("zeros in the rest of an initial packet", raw[25:].hex(), offset=offset)
    return Hello(UUID(bytes=raw[8:24]), raw[24])


__all__ = [
    "MAGIC",
    "PACKET_BYTES",
    "READABLE",
    "Hello",
    "Method",
    "MultifdReader",
    "Packet",
    "encode_header",
    "pages_per_packet",
]
