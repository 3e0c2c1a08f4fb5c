"""What a server answers to one request: simple replies, and chunks of structured ones.

The server chooses lengths and offsets, and both are checked against the request before a byte
is taken.  A read that succeeds has filled every byte exactly once.
"""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from vmferry.errors import printable
from vmferry.images.storage import Views
from vmferry.images.views import cut

from .messages import (
    DONE,
    ERRORS,
    SIMPLE,
    SIMPLE_MAGIC,
    STRUCTURED,
    STRUCTURED_MAGIC,
    Chunk,
)
from .wire import Wire

Blocks: TypeAlias = tuple[int, int, int]
"""Offset, length, and what a context says of these bytes."""

_MAX_EXTENTS: Final = 1 << 17
"""In one answer: as many as QEMU sends at most (``NBD_MAX_BLOCK_STATUS_EXTENTS``)."""
_MAX_TEXT: Final = 4096
_MAX_CHUNKS: Final = 1 << 17
"""Of one request."""


@dataclass(slots=True)
class Answer:
    """What is to be answered: the request of *cookie* for *length* bytes from *offset* on.

    *into* takes the bytes of a read; *contexts* are the numbers of the block status that was asked.
    """

    wire: Wire
    cookie: int
    structured: bool
    offset: int = 0
    length: int = 0
    into: Views = ()
    contexts: tuple[int, ...] = ()
    status: dict[int, list[Blocks]] = field(default_factory=dict)
    _filled: list[tuple[int, int]] = field(default_factory=list)
    _error: OSError | None = None

    def take(self) -> dict[int, list[Blocks]]:
        """Receive all of it; the status of blocks by context, if there is any.

        Raises OSError for what the server reports; StorageError if it breaks the rules, and then
        the connection has ended.
        """
        for _ in range(_MAX_CHUNKS):
            if self._take_one():
                break
        else:
            self.wire.refuse(f"at most {_MAX_CHUNKS} chunks", "more")
        if self._error is not None:
            raise self._error
        if self.into:
            self._check_filled()
        return self.status

    def _take_one(self) -> bool:
        """Receive one message; whether it is the last one."""
        magic = int.from_bytes(self.wire.receive(4), "big")
        if magic == SIMPLE_MAGIC:
            self._take_simple()
            return True
        if magic != STRUCTURED_MAGIC or not self.structured:
            self.wire.refuse("a reply", f"the number {magic:#010x}")
        flags, kind, cookie, length = STRUCTURED.unpack(self.wire.receive(STRUCTURED.size))
        self._check_cookie(cookie)
        match kind:
            case Chunk.NONE if not length and flags & DONE:
                pass
            case Chunk.OFFSET_DATA if length > 8:
                self._fill(*self._place(length - 8), hole=False)
            case Chunk.OFFSET_HOLE if length == 12:
                start, size = struct.unpack(">QI", self.wire.receive(12))
                self._fill(start, size, hole=True)
            case Chunk.BLOCK_STATUS:
                self._take_status(length)
            case _ if kind & 1 << 15:
                self._take_error(length)
            case _:
                self.wire.refuse("a chunk that fits", f"one of type {kind} and {length} bytes")
        return bool(flags & DONE)

    def _take_simple(self) -> None:
        number, cookie = SIMPLE.unpack(self.wire.receive(SIMPLE.size))
        self._check_cookie(cookie)
        if self.structured and (self.into or self.contexts):
            self.wire.refuse("a structured reply", "a simple one")
        if self._filled or self.status:
            self.wire.refuse("the rest of a structured reply", "a simple one")
        if number:
            self._error = _reported(number, "")
        elif self.into:
            self._fill(self.offset, self.length, hole=False)

    def _place(self, size: int) -> tuple[int, int]:
        return int.from_bytes(self.wire.receive(8), "big"), size

    def _fill(self, start: int, size: int, *, hole: bool) -> None:
        """Take *size* bytes for offset *start*."""
        first = start - self.offset
        if not self.into or not size or first < 0 or first + size > self.length:
            self.wire.refuse(
                f"bytes of the {self.length} from {self.offset} on", f"{size} from {start} on"
            )
        target = cut(self.into, first)[1] if first else self.into
        for view in cut(target, size)[0]:
            if hole:
                view[:] = bytes(view.nbytes)
            else:
                self.wire.receive_into(view)
        self._filled.append((first, first + size))

    def _check_filled(self) -> None:
        at = 0
        for start, end in sorted(self._filled):
            if start != at:
                self.wire.refuse("every byte once", f"byte {self.offset + at} never or twice")
            at = end
        if at != self.length:
            self.wire.refuse(f"{self.length} bytes", f"{at}")

    def _take_status(self, length: int) -> None:
        if len(self.status) == len(self.contexts) or length % 8 != 4 or length < 12:
            self.wire.refuse("a block status that was asked for", f"one of {length} bytes")
        if length > 4 + 8 * _MAX_EXTENTS:
            self.wire.refuse(f"at most {_MAX_EXTENTS} extents", f"{length} bytes of them")
        data = self.wire.receive(length)
        context = int.from_bytes(data[:4])
        if context not in self.contexts or context in self.status:
            numbers = " or ".join(map(str, self.contexts))
            self.wire.refuse(f"context {numbers}, once each", f"{context}")
        blocks = self.status[context] = []
        at, end = self.offset, self.offset + self.length
        for size, flags in struct.iter_unpack(">II", memoryview(data)[4:]):
            if not size or at >= end:
                self.wire.refuse("extents within the request", f"{size} bytes at {at}")
            stop = min(at + size, end)  # the last one may go beyond
            blocks.append((at, stop - at, flags))
            at = stop

    def _take_error(self, length: int) -> None:
        if not 6 <= length <= _MAX_TEXT + 14:
            self.wire.refuse("an error of at most 4096 bytes", f"one of {length}")
        data = self.wire.receive(length)
        number, size = struct.unpack(">IH", data[:6])
        if not number or 6 + size > length:
            self.wire.refuse("an error and its text", printable(bytes(data)))
        if self._error is None:
            self._error = _reported(number, bytes(data[6 : 6 + size]).decode(errors="replace"))

    def _check_cookie(self, cookie: int) -> None:
        if cookie != self.cookie:
            self.wire.refuse(f"the reply to request {self.cookie}", f"one to {cookie}")


def _reported(number: int, text: str) -> OSError:
    known = ERRORS.get(number, errno.EIO)
    says = f" (the server says {printable(text)})" if text else ""
    return OSError(known, os.strerror(known) + says)
