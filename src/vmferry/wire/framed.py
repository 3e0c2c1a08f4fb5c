"""Iterable sections of machines written in Python: each body is one frame, all of them alike.

::

    0   4    "VFRY"
    4   be32 capacity: bytes of data in every frame of this section, 1 to limits.FRAME
    8   be32 used: how many of them are meant
    12  ...  capacity bytes; zeros behind those used

QEMU knows no such sections, and nothing in its format says how long the pieces of an iterable
section are.  The frame does, so that whoever reads a stream can pass over them.  All frames of a
section are of one size because the closing description has one entry for a section, and QEMU's
``scripts/analyze-migration.py`` applies it to every body: so it reads these streams too.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

from vmferry.errors import LimitExceeded, printable

from . import limits
from .buffer import Cursor, Parse

MAGIC: Final = b"VFRY"
_HEAD: Final = Struct(">4sII")


@dataclass(frozen=True, slots=True)
class Frame:
    """A piece of a section: *data*, at most *capacity* bytes."""

    capacity: int
    data: bytes

    def encode(self) -> bytes:
        """The body as on the wire."""
        head = _HEAD.pack(MAGIC, self.capacity, len(self.data))
        return head + self.data + bytes(self.capacity - len(self.data))


def frame_description(capacity: int) -> list[dict[str, Any]]:
    """The fields of a body in the closing description."""
    numbers = ("magic", "capacity", "used")
    fields: list[dict[str, Any]] = [{"name": name, "type": "uint32", "size": 4} for name in numbers]
    return [*fields, {"name": "data", "type": "buffer", "size": capacity}]


def begins_frame(at: Cursor) -> Parse[bool]:
    """Whether a frame begins here; waits no longer than it takes to tell."""
    while len(at.buffer) < len(MAGIC) and MAGIC.startswith(bytes(at.buffer.view())):
        if at.buffer.ended:
            return False
        yield None
    return bytes(at.buffer.view()[: len(MAGIC)]) == MAGIC


class FrameReader:
    """Reads the bodies of one section."""

    def __init__(self) -> None:
        self._capacity: int | None = None

    def body(self, at: Cursor) -> Parse[None]:
        """Read one body; yields a :class:`Frame`."""
        offset = at.buffer.offset
        yield from at.need(_HEAD.size, "the head of a frame")
        magic, capacity, used = _HEAD.unpack(at.buffer.peek(_HEAD.size))
        if magic != MAGIC:
            raise at.fail(f"a frame ({MAGIC.hex(' ')})", printable(magic))
        if not 1 <= capacity <= limits.FRAME:
            raise LimitExceeded(
                f"a frame for 1 to {limits.FRAME} bytes", str(capacity), offset=offset + 4
            )
        if self._capacity not in (None, capacity):
            raise at.fail(
                f"a frame for {self._capacity} bytes, as all of this section",
                str(capacity),
                offset=offset + 4,
            )
        if used > capacity:
            raise at.fail(f"a frame with at most {capacity} bytes", str(used), offset=offset + 8)
        self._capacity = capacity
        raw = yield from at.take(_HEAD.size + capacity, "a frame")
        data = raw[_HEAD.size : _HEAD.size + used]
        if raw[_HEAD.size + used :].strip(b"\0"):
            raise at.fail(
                f"zeros behind the {used} bytes of a frame",
                "something else",
                offset=offset + _HEAD.size + used,
            )
        yield Frame(capacity, data)
