"""Where the bytes of a channel wait to be parsed, and how a parser asks for more of them.

A parser is a generator: it yields events, and ``None`` where it needs bytes that are not there yet.
What it does depends only on the bytes, never on how they were cut into reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, Final, Generic, TypeVar

from vmferry.errors import StreamError, TruncatedStream, UsageError, printable

T = TypeVar("T")
E = TypeVar("E")
Parse = Generator[Any, None, T]
"""A step of a parser: yields events or ``None`` (more bytes, please) and returns a ``T``."""

CAPACITY: Final = 4 << 20
"""Bytes of a fresh buffer: a thousand pages make one batch, and batches cost by their number."""

_ROOM: Final = 1 << 16


class ReceiveBuffer:
    """Bytes received and not parsed yet, contiguous, with the offset of each in its channel.

    ``room()`` lends the free part to be filled, ``received(n)`` says how much of it was.  Views of
    the content stay right until the next ``room()``, which may move or replace the memory.  Grows
    by doubling, so never beyond twice what really came in.

    ``borrow()`` takes memory of somebody else in its place, up to the next ``room()``.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._memory = bytearray(capacity)
        self._view = memoryview(self._memory)
        self._start = 0
        self._end = 0
        self.offset = 0
        self.ended = False

    def __len__(self) -> int:
        return self._end - self._start

    def room(self) -> memoryview:
        """Free memory to read into, never empty."""
        if self.borrows:
            self._return()
        if self._start == self._end:
            self._start = self._end = 0
        capacity = len(self._memory)
        if capacity - self._end < min(_ROOM, capacity // 4):
            held = len(self)
            if held > capacity // 2:
                grown = bytearray(2 * capacity)
                grown[:held] = self.view()
                self._memory = grown
                self._view = memoryview(grown)
            else:
                self._view[:held] = self.view()
            self._start, self._end = 0, held
        return self._view[self._end :]

    @property
    def borrows(self) -> bool:
        """Whether the content lies in memory that was borrowed."""
        return self._view.obj is not self._memory

    def borrow(self, memory: memoryview, start: int, end: int) -> None:
        """Let *memory* from *start* to *end* be the content: what waited, and more behind it."""
        self._view, self._start, self._end = memory, start, end

    def _return(self) -> None:
        """Move what waits to memory of its own."""
        held = self.view()
        capacity = len(self._memory)
        while capacity < 2 * len(held):
            capacity *= 2
        if capacity > len(self._memory):
            self._memory = bytearray(capacity)
        self._view = memoryview(self._memory)
        self._view[: len(held)] = held
        self._start, self._end = 0, len(held)

    def drop(self) -> None:
        """Forget what is in it, and let go of its memory: nothing more will be received."""
        self._memory = bytearray()
        self._view = memoryview(self._memory)
        self._start = self._end = 0

    def received(self, count: int) -> None:
        """Take note that *count* bytes were put into ``room()``; 0 is the end of the input."""
        if count == 0:
            self.ended = True
        self._end += count

    def view(self) -> memoryview:
        """Everything that waits."""
        return self._view[self._start : self._end]

    def peek(self, count: int) -> memoryview:
        """The next *count* bytes, which must be there."""
        return self._view[self._start : self._start + count]

    def advance(self, count: int) -> None:
        """Go past *count* bytes; views of them stay right until ``room()``."""
        self._start += count
        self.offset += count

    def bypassed(self, count: int) -> None:
        """Take note that *count* bytes of the channel went elsewhere, and nothing waits."""
        self.offset += count


class Cursor:
    """Reading numbers and names off a buffer, each step a generator that waits for its bytes."""

    __slots__ = ("buffer",)

    def __init__(self, buffer: ReceiveBuffer) -> None:
        self.buffer = buffer

    def need(self, count: int, what: str) -> Parse[None]:
        """Wait until *count* bytes are there; *what* names them should the input end before."""
        while len(self.buffer) < count:
            if self.buffer.ended:
                raise TruncatedStream(
                    what,
                    f"the end of the input after {len(self.buffer)} of {count} bytes",
                    offset=self.buffer.offset,
                    advice="the stream was cut off, or its sender failed",
                )
            yield None

    def more(self) -> Parse[bool]:
        """Whether anything follows: waits for a byte, or for the end of the input."""
        while not self.buffer:
            if self.buffer.ended:
                return False
            yield None
        return True

    def take(self, count: int, what: str) -> Parse[bytes]:
        """The next *count* bytes, copied: for names and small payloads."""
        yield from self.need(count, what)
        taken = bytes(self.buffer.peek(count))
        self.buffer.advance(count)
        return taken

    def number(self, size: int, what: str) -> Parse[int]:
        """A big-endian unsigned number of *size* bytes."""
        yield from self.need(size, what)
        value = int.from_bytes(self.buffer.peek(size))
        self.buffer.advance(size)
        return value

    def peek_number(self, size: int, what: str) -> Parse[int]:
        """As :meth:`number`, left in the buffer."""
        yield from self.need(size, what)
        return int.from_bytes(self.buffer.peek(size))

    def name(self, what: str) -> Parse[str]:
        """A length byte and a name of 1 to 255 bytes, UTF-8 without control characters."""
        offset = self.buffer.offset
        size = yield from self.number(1, f"the length of {what}")
        raw = yield from self.take(size, what)
        return decode_name(raw, what, offset)

    def fail(self, expected: str, found: str, **place: Any) -> StreamError:
        """The error for something wrong at the current byte (or at ``offset=``)."""
        place.setdefault("offset", self.buffer.offset)
        return StreamError(expected, found, **place)


def within(step: Parse[T], **place: Any) -> Parse[T]:
    """The same step; errors that pass through learn what it knows of the place."""
    try:
        return (yield from step)
    except StreamError as error:
        error.within(**place)
        raise


class ChannelReader(ABC, Generic[E]):
    """Bytes of one channel in, events out.

    Fill ``buffer.room()``, report with ``buffer.received(count)`` (0 at the end of the input), then
    iterate over :meth:`events` until it stops, which means *more bytes, please*, or the end where
    :attr:`finished`.  Views in events stay right until the next ``buffer.room()``.
    """

    def __init__(self, channel: str, capacity: int = CAPACITY) -> None:
        self.channel = channel
        self.buffer = ReceiveBuffer(capacity)
        self.finished = False
        self._at = Cursor(self.buffer)
        self._error: StreamError | None = None
        self._steps = self._run()

    def feed(self, data: bytes | memoryview) -> Iterator[E]:
        """The events of *data*, copied in piece by piece; empty *data* ends the input."""
        data = memoryview(data)
        if not data:
            self.buffer.received(0)
            yield from self.events()
        while data and not self.finished:
            room = self.buffer.room()
            piece = data[: len(room)]
            room[: len(piece)] = piece
            self.buffer.received(len(piece))
            data = data[len(piece) :]
            yield from self.events()

    def events(self) -> Iterator[E]:
        """Everything that the bytes received so far say; once broken, the same error each time."""
        if self._error is not None:
            raise self._error
        try:
            for event in self._steps:
                if event is None:
                    return
                yield event
        except StreamError as error:
            self._error = error.within(channel=self.channel, offset=self.buffer.offset)
            raise

    def _run(self) -> Parse[None]:
        yield from self._parse()
        self.finished = True

    @abstractmethod
    def _parse(self) -> Parse[None]:
        """Read the channel from its first byte to its last."""


def decode_name(raw: bytes, what: str, offset: int | None = None) -> str:
    """*raw* as text; refused where it is empty, not UTF-8, or has control characters."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        found = printable(raw) if raw else "an empty name"
        raise StreamError(f"{what} as printable text of 1 to 255 bytes", found, offset=offset)
    return text


def unpack_name(raw: bytes, what: str) -> str:
    """The name in *raw*, which is its length byte and the name, and nothing behind."""
    if raw[0] != len(raw) - 1:
        raise StreamError(f"{len(raw) - 1} as the length of {what}", str(raw[0]))
    return decode_name(raw[1:], what)


def either(lengths: range) -> str:
    """The allowed *lengths* in words."""
    if len(lengths) < 3:
        return " or ".join(map(str, lengths))
    return f"{lengths.start} to {lengths.stop - 1}"


def encode_name(name: str) -> bytes:
    """*name* with its length byte in front."""
    raw = name.encode("utf-8")
    if not 1 <= len(raw) <= 255:
        raise UsageError(f"a name has 1 to 255 bytes, and {printable(name)} has {len(raw)}")
    return bytes([len(raw)]) + raw
