"""The return path: what the destination answers on the main channel.

QEMU 7.2 ``migration/migration.c`` (``source_return_path_thread``).  A message is a 16-bit type, a
16-bit length and a payload; a bitmap follows its message outside the length.  One message is not
QEMU's: a destination of this kind tells a source of this kind why it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from vmferry.errors import LimitExceeded, StreamError, printable

from .buffer import ChannelReader, Cursor, Parse, either, encode_name, unpack_name, within

_BITMAP_END: Final = 0x0123456789ABCDEF
_REASON: Final = 512


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
        head = Message.encode(self)
        return head + len(self.bitmap).to_bytes(8) + self.bitmap + _BITMAP_END.to_bytes(8)


@dataclass(frozen=True, slots=True)
class Reason(Message):
    """Why the destination is about to refuse; only for sources that announced themselves."""

    kind = 0x564D
    text: str

    def payload(self) -> bytes:
        """The text, cut to what a message holds."""
        return self.text.encode()[:_REASON].decode(errors="ignore").encode() or b"?"


class ResumeAck(Message):
    """Postcopy recovery: the destination is ready to go on."""

    kind = 6

    def payload(self) -> bytes:
        """Always 1."""
        return (1).to_bytes(4)


class SwitchoverAck(Message):
    """The source may switch over (QEMU 8.1)."""

    kind = 7


def _number(message: Callable[[int], Message]) -> Callable[[bytes], Message]:
    return lambda payload: message(int.from_bytes(payload))


def _request(payload: bytes) -> Message:
    start, length = int.from_bytes(payload[:8]), int.from_bytes(payload[8:12])
    if length == 0 or length > (1 << 64) - start:
        raise StreamError("a range of one or more bytes below 2^64", f"{start:#x}+{length:#x}")
    block = unpack_name(payload[12:], "the name of a RAM block") if len(payload) > 12 else None
    return RequestPages(start, length, block)


def _reason(payload: bytes) -> Message:
    return Reason(printable(payload, _REASON))


def _resume_ack(payload: bytes) -> Message:
    if (value := int.from_bytes(payload)) != 1:
        raise StreamError("an acknowledgement of 1", str(value))
    return ResumeAck()


# Kind: allowed lengths of the payload, and its reader; a bitmap stands behind its message.
_MESSAGES: Final[dict[int, tuple[range, Callable[[bytes], Message] | None]]] = {
    1: (range(4, 5), _number(Shut)),
    2: (range(4, 5), _number(Pong)),
    3: (range(14, 269), _request),
    4: (range(12, 13), _request),
    5: (range(2, 257), None),
    6: (range(4, 5), _resume_ack),
    7: (range(1), lambda _payload: SwitchoverAck()),
    Reason.kind: (range(1, _REASON + 1), _reason),
}

_UNKNOWN: Final[tuple[range, None]] = range(0), None


class ReturnPathReader(ChannelReader[Message]):
    """Reads what a destination answers.

    ``max_bitmap`` bounds a received bitmap in bytes: one bit for each page of the largest block.
    """

    def __init__(self, *, channel: str = "return path", max_bitmap: int = 0) -> None:
        super().__init__(channel, 1 << 12)
        self._max_bitmap = max_bitmap

    def _parse(self) -> Parse[None]:
        while (yield from self._at.more()):
            message = self._whole()
            if message is None:
                message = yield from within(self._message(self._at), offset=self.buffer.offset)
            yield message

    def _whole(self) -> Message | None:
        """The next message if all of it is there, as nearly always: a guest may wait for it."""
        view = self.buffer.view()
        if len(view) < 4:
            return None
        kind, size = view[0] << 8 | view[1], view[2] << 8 | view[3]
        lengths, read = _MESSAGES.get(kind, _UNKNOWN)
        if read is None or size not in lengths or len(view) < 4 + size:
            return None
        try:
            message = read(bytes(view[4 : 4 + size]))
        except StreamError as error:
            raise error.within(offset=self.buffer.offset) from None
        self.buffer.advance(4 + size)
        return message

    def _message(self, at: Cursor) -> Parse[Message]:
        kind = yield from at.number(2, "the type of a message")
        if kind not in _MESSAGES:
            raise StreamError("a return-path message from 1 to 7", str(kind))
        size = yield from at.number(2, "the length of a message")
        lengths, read = _MESSAGES[kind]
        if size not in lengths:
            raise StreamError(f"{either(lengths)} bytes for message {kind}", str(size))
        payload = yield from at.take(size, f"message {kind}")
        return read(payload) if read is not None else (yield from self._bitmap(at, payload))

    def _bitmap(self, at: Cursor, payload: bytes) -> Parse[HavePages]:
        block = unpack_name(payload, "the name of a RAM block")
        offset = at.buffer.offset
        size = yield from at.number(8, "the size of a bitmap")
        if size > self._max_bitmap:
            most = f"a bitmap of at most {self._max_bitmap} bytes"
            raise LimitExceeded(most, str(size), offset=offset, block=block)
        if size % 8:
            raise at.fail("a multiple of 8 bytes", str(size), offset=offset, block=block)
        bitmap = yield from at.take(size, "a bitmap")
        offset = at.buffer.offset
        if (mark := (yield from at.number(8, "the end of a bitmap"))) != _BITMAP_END:
            raise at.fail(
                f"the end mark {_BITMAP_END:#x}", f"{mark:#x}", offset=offset, block=block
            )
        return HavePages(block, bitmap)
