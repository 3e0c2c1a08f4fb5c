"""Commands: what the source tells the destination between sections.

QEMU 7.2 ``migration/savevm.c`` (``enum qemu_vm_cmd``): a type byte, a 16-bit number, a 16-bit
length, a payload.  One class a command, so that none can be written with the wrong payload.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from vmferry.errors import LimitExceeded, StreamError

from . import limits
from .buffer import Cursor, Parse, decode_name, either, encode_name, unpack_name, within
from .layout import Kind


@dataclass(frozen=True, slots=True)
class Command:
    """Base of all commands; ``number`` is its number on the wire."""

    number: ClassVar[int]

    def payload(self) -> bytes:
        """What stands behind the length."""
        return b""

    def encode(self) -> bytes:
        """The command as on the wire."""
        payload = self.payload()
        head = bytes([Kind.COMMAND]) + self.number.to_bytes(2) + len(payload).to_bytes(2)
        return head + payload


class OpenReturnPath(Command):
    """The destination may answer on this channel from now on."""

    number = 1


@dataclass(frozen=True, slots=True)
class Ping(Command):
    """The destination answers with a PONG of the same value."""

    number = 2
    value: int

    def payload(self) -> bytes:
        """The value."""
        return self.value.to_bytes(4)


@dataclass(frozen=True, slots=True)
class PostcopyAdvise(Command):
    """The source may switch to postcopy later.

    ``page_sizes`` is the bitwise OR of the page sizes of all RAM blocks, ``target_page`` the size
    of a target page, in bytes; both ``None`` where only dirty bitmaps may be postcopied.
    """

    number = 3
    page_sizes: int | None = None
    target_page: int | None = None

    def payload(self) -> bytes:
        """Both sizes, or nothing."""
        if self.page_sizes is None or self.target_page is None:
            return b""
        return self.page_sizes.to_bytes(8) + self.target_page.to_bytes(8)


class PostcopyListen(Command):
    """The destination reads pages aside from now on, and requests those it misses."""

    number = 4


class PostcopyRun(Command):
    """The destination starts the machine."""

    number = 5


@dataclass(frozen=True, slots=True)
class RamDiscard(Command):
    """Parts of a RAM block to drop: *(start, length)* in bytes."""

    number = 6
    block: str
    ranges: tuple[tuple[int, int], ...]

    def payload(self) -> bytes:
        """A version, the block, a zero byte, the ranges."""
        ranges = b"".join(start.to_bytes(8) + size.to_bytes(8) for start, size in self.ranges)
        return b"\0" + encode_name(self.block) + b"\0" + ranges


class EnableColo(Command):
    """COLO fault tolerance follows (QEMU 3.1)."""

    number = 8


class PostcopyResume(Command):
    """The bitmaps were received, postcopy goes on (QEMU 3.0)."""

    number = 9


@dataclass(frozen=True, slots=True)
class ReceivedBitmap(Command):
    """The destination shall say which pages of a RAM block it has (QEMU 3.0)."""

    number = 10
    block: str

    def payload(self) -> bytes:
        """The block's name."""
        return encode_name(self.block)


class SwitchoverStart(Command):
    """The source has stopped its machine (QEMU 10.0)."""

    number = 11


@dataclass(frozen=True, slots=True)
class Package(Command):
    """A stream within the stream, read whole before any of it is acted on.

    ``content`` lends the reader's buffer; ``offset`` is where it starts in the channel.
    """

    number = 7
    content: bytes | memoryview
    offset: int = 0

    def payload(self) -> bytes:
        """The length of the content, which follows outside the payload."""
        return len(self.content).to_bytes(4)

    def encode(self) -> bytes:
        """The command with its content."""
        return Command.encode(self) + bytes(self.content)


def _ping(payload: bytes) -> Command:
    return Ping(int.from_bytes(payload))


def _advise(payload: bytes) -> Command:
    if not payload:
        return PostcopyAdvise()
    return PostcopyAdvise(int.from_bytes(payload[:8]), int.from_bytes(payload[8:]))


def _discard(payload: bytes) -> Command:
    if payload[0] != 0:
        raise StreamError("version 0 of the discard command", str(payload[0]))
    size = payload[1]
    name, rest = payload[2 : 2 + size], payload[2 + size :]
    if len(rest) < 17 or (len(rest) - 1) % 16 or rest[0] != 0:
        raise StreamError(
            "a block's name, a zero byte and one or more ranges of 16 bytes",
            f"{len(payload)} bytes of which {size} for the name",
        )
    numbers = [int.from_bytes(rest[at : at + 8]) for at in range(1, len(rest), 8)]
    ranges = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    for start, length in ranges:
        if length == 0 or start + length > 1 << 64:
            raise StreamError("a range of one or more bytes below 2^64", f"{start:#x}+{length:#x}")
    return RamDiscard(decode_name(name, "the name of a RAM block"), ranges)


def _bitmap(payload: bytes) -> Command:
    return ReceivedBitmap(unpack_name(payload, "the name of a RAM block"))


def _bare(command: type[Command]) -> Callable[[bytes], Command]:
    return lambda _payload: command()


_NONE: Final = range(1)

# Command: allowed lengths of the payload, and its reader; a package has more behind it.
_READERS: Final[dict[type[Command], tuple[range, Callable[[bytes], Command] | None]]] = {
    OpenReturnPath: (_NONE, _bare(OpenReturnPath)),
    Ping: (range(4, 5), _ping),
    PostcopyAdvise: (range(0, 17, 16), _advise),
    PostcopyListen: (_NONE, _bare(PostcopyListen)),
    PostcopyRun: (_NONE, _bare(PostcopyRun)),
    RamDiscard: (range(20, 1 << 16), _discard),
    Package: (range(4, 5), None),
    EnableColo: (_NONE, _bare(EnableColo)),
    PostcopyResume: (_NONE, _bare(PostcopyResume)),
    ReceivedBitmap: (range(2, 257), _bitmap),
    SwitchoverStart: (_NONE, _bare(SwitchoverStart)),
}
_COMMANDS: Final = {command.number: command for command in _READERS}


def parse_command(at: Cursor) -> Parse[Command]:
    """Read a command; the cursor stands on its type byte."""
    return (yield from within(_command(at), offset=at.buffer.offset))


def _command(at: Cursor) -> Parse[Command]:
    at.buffer.advance(1)
    number = yield from at.number(2, "a command")
    if number not in _COMMANDS:
        raise StreamError("a command from 1 to 11", str(number))
    size = yield from at.number(2, "the length of a command")
    lengths, read = _READERS[_COMMANDS[number]]
    if size not in lengths:
        raise StreamError(f"{either(lengths)} bytes for {command_name(number)}", str(size))
    if read is None:
        return (yield from _package(at))
    return read((yield from at.take(size, command_name(number))))


def command_name(number: int) -> str:
    """How messages call a command: by its number and the name of its class."""
    return f"command {number} ({_COMMANDS[number].__name__})"


def _package(at: Cursor) -> Parse[Package]:
    size = yield from at.number(4, "the length of the package")
    if not 1 <= size <= limits.PACKAGE:
        raise LimitExceeded(f"a package of 1 to {limits.PACKAGE} bytes", str(size))
    yield from at.need(size, "the package")
    package = Package(at.buffer.peek(size), at.buffer.offset)
    _check_package(package.content, package.offset)
    at.buffer.advance(size)
    return package


_LISTEN: Final = PostcopyListen().encode()
_PING: Final = Ping(0).encode()
_RUN: Final = PostcopyRun().encode()


def _check_package(content: bytes | memoryview, offset: int) -> None:
    """What is inside, as far as it shows: the devices in the middle have no lengths."""
    first, second, last = content[:5], content[5:8], content[5:][-5:]
    if first != _LISTEN:
        raise StreamError(
            f"a package that begins with LISTEN ({_LISTEN.hex(' ')})",
            first.hex(" ") or "nothing",
            offset=offset,
        )
    if second[:1] != bytes([Kind.FULL]) and second not in (_PING[:3], _RUN[:3]):
        raise StreamError(
            "a device, a ping or RUN behind LISTEN", second.hex(" ") or "nothing", offset=offset + 5
        )
    if last != _RUN:
        raise StreamError(
            f"a package that ends with RUN ({_RUN.hex(' ')})",
            last.hex(" "),
            offset=offset + len(content) - len(last),
        )


__all__ = [
    "Command",
    "EnableColo",
    "OpenReturnPath",
    "Package",
    "Ping",
    "PostcopyAdvise",
    "PostcopyListen",
    "PostcopyResume",
    "PostcopyRun",
    "RamDiscard",
    "ReceivedBitmap",
    "SwitchoverStart",
    "command_name",
    "parse_command",
]
