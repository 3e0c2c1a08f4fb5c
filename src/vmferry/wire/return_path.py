"""The return path: what the destination answers on the main channel.

QEMU 7.2 ``migration/migration.c`` (``source_return_path_thread``).  A message is a 16-bit type, a
16-bit length and a payload; a bitmap follows its message outside the length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from vmferry.errors import LimitExceeded, StreamError

from . import limits
from .buffer import ChannelReader, Cursor, Parse, decode_name, encode_name

_BITMAP_END: Final = 0x0123456789ABCDEF


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; ``kind`` is its number on the wire."""

    kind: ClassVar[int]

    def payload(self) -> bytes:
        """What stands behind the length."""
        return b""

    def encode(self) -> bytes:
        """The message as on the wire."""
        payload = self.payload()
        return self.kind.to_bytes(2) + len(payload).to_bytes(2) + payload


@dataclass(frozen=True, slots=True)
class Shut(Message):
    """The destination is done: status 0 where it has taken over, anything else where it failed."""

    kind = 1
    status: int

    def payload(self) -> bytes:
        """The status."""
        return self.status.to_bytes(4)


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """The answer to a ping."""

    kind = 2
    value: int

    def payload(self) -> bytes:
        """The ping's value."""
        return self.value.to_bytes(4)


@dataclass(frozen=True, slots=True)
class RequestPages(Message):
    """Postcopy: *length* bytes from *start* of a RAM block are needed now.

    ``block`` is ``None`` where it is the block of the request before.
    """

    start: int
    length: int
    block: str | None = None

    def payload(self) -> bytes:
        """The range, and the block where it is named."""
        name = encode_name(self.block) if self.block is not None else b""
        return self.start.to_bytes(8) + self.length.to_bytes(4) + name

    def encode(self) -> bytes:
        """The message as on the wire: type 3 with a name, 4 without."""
        payload = self.payload()
        kind = 3 if self.block is not None else 4
        return kind.to_bytes(2) + len(payload).to_bytes(2) + payload


@dataclass(frozen=True, slots=True)
class HavePages(Message):
    """Postcopy recovery: the pages of a block that arrived.

    Bit *i* % 8 of byte *i* // 8 of the bitmap stands for page *i*.
    """

    kind = 5
    block: str
    bitmap: bytes

    def payload(self) -> bytes:
        """The block's name; the bitmap follows the message."""
        return encode_name(self.block)

    def encode(self) -> bytes:
        """The message with its bitmap."""
        payload = self.payload()
        head = self.kind.to_bytes(2) + len(payload).to_bytes(2) + payload
        return head + len(self.bitmap).to_bytes(8) + self.bitmap + _BITMAP_END.to_bytes(8)


@dataclass(frozen=True, slots=True)
class ResumeAck(Message):
    """Postcopy recovery: the destination is ready to go on."""

    kind = 6
    value: int = 1

    def payload(self) -> bytes:
        """Always 1."""
        return self.value.to_bytes(4)


class SwitchoverAck(Message):
    """The source may switch over (QEMU 8.1)."""

    kind = 7


def _number(message: Callable[[int], Message]) -> Callable[[bytes], Message]:
    return lambda payload: message(int.from_bytes(payload))


def _request(payload: bytes) -> Message:
    start, length = int.from_bytes(payload[:8]), int.from_bytes(payload[8:12])
    if length == 0 or length > (1 << 64) - start:
        raise StreamError("a range of one or more bytes below 2^64", f"{start:#x}+{length:#x}")
    if len(payload) == 12:
        return RequestPages(start, length)
    if payload[12] != len(payload) - 13:
        raise StreamError(f"a name of {len(payload) - 13} bytes", f"length byte {payload[12]}")
    return RequestPages(start, length, decode_name(payload[13:], "the name of a RAM block", 0))


# Kind: allowed lengths of the payload, and its reader.  HavePages is read apart.
_MESSAGES: Final[dict[int, tuple[range, Callable[[bytes], Message] | None]]] = {
    1: (range(4, 5), _number(Shut)),
    2: (range(4, 5), _number(Pong)),
    3: (range(14, 269), _request),
    4: (range(12, 13), _request),
    6: (range(4, 5), _number(ResumeAck)),
    7: (range(1), lambda _payload: SwitchoverAck()),
}


class ReturnPathReader(ChannelReader[Message]):
    """Reads what a destination answers.

    ``max_bitmap`` bounds a received bitmap in bytes: one bit for each page of the largest block.
    """

    def __init__(self, *, channel: str = "return path", max_bitmap: int = 0) -> None:
        super().__init__(channel, 1 << 12)
        self._max_bitmap = max_bitmap

    def _parse(self) -> Parse[None]:
        while (yield from self._at.more()):
            yield (yield from self._message(self._at))

    def _message(self, at: Cursor) -> Parse[Any]:
        offset = self.buffer.offset
        kind = yield from at.number(2, "the type of a message")
        size = yield from at.number(2, "the length of a message")
        if kind != HavePages.kind and kind not in _MESSAGES:
            raise at.fail("a return-path message from 1 to 7", str(kind), offset=offset)
        lengths, read = _MESSAGES.get(kind, (range(2, 257), None))
        if size > limits.RETURN_PATH_MESSAGE or size not in lengths:
            allowed = f"{lengths.start} to {lengths.stop - 1}"
            raise at.fail(f"{allowed} bytes for message {kind}", str(size), offset=offset)
        payload = yield from at.take(size, f"message {kind}")
        return read(payload) if read is not None else (yield from self._bitmap(at, payload))

    def _bitmap(self, at: Cursor, payload: bytes) -> Parse[HavePages]:
        offset = self.buffer.offset
        if payload[0] != len(payload) - 1:
            raise at.fail(f"a name of {len(payload) - 1} bytes", f"length byte {payload[0]}")
        block = decode_name(payload[1:], "the name of a RAM block", offset)
        size = yield from at.number(8, "the size of a bitmap")
        if size > self._max_bitmap:
            raise LimitExceeded(
                f"a bitmap of at most {self._max_bitmap} bytes", str(size), offset=offset
            )
        bitmap = yield from at.take(size, "a bitmap")
        if (yield from at.number(8, "the end of a bitmap")) != _BITMAP_END:
            raise at.fail(f"the end mark {_BITMAP_END:#x}", "another", offset=offset)
        return HavePages(block, bitmap)
