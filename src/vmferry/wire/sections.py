"""The frame of the stream: its header, and what opens and closes sections.

QEMU 7.2 ``migration/savevm.c``.  A section is known by name and instance; its number is a handle
that the source chooses anew for each stream.  Footers come with machine types from 2.4 on.
"""

from __future__ import annotations

from dataclasses import dataclass

from .buffer import Cursor, Parse, encode_name
from .layout import MAGIC, VERSION, Kind


@dataclass(frozen=True, slots=True)
class Header:
    """The first eight bytes: magic and version 3."""

    def encode(self) -> bytes:
        """The header as on the wire."""
        return MAGIC + VERSION.to_bytes(4)


@dataclass(frozen=True, slots=True)
class SectionStart:
    """An iterable section begins: it has parts and an end later on."""

    number: int
    name: str
    instance: int
    version: int

    def encode(self, kind: Kind = Kind.START) -> bytes:
        """The section's head as on the wire; a device's head differs in its *kind* alone."""
        head = bytes([kind]) + self.number.to_bytes(4) + encode_name(self.name)
        return head + self.instance.to_bytes(4) + self.version.to_bytes(4)


@dataclass(frozen=True, slots=True)
class SectionPart:
    """More of an iterable section."""

    number: int
    name: str

    def encode(self) -> bytes:
        """The section's head as on the wire."""
        return bytes([Kind.PART]) + self.number.to_bytes(4)


@dataclass(frozen=True, slots=True)
class SectionEnd:
    """The last of an iterable section."""

    number: int
    name: str

    def encode(self) -> bytes:
        """The section's head as on the wire."""
        return bytes([Kind.END]) + self.number.to_bytes(4)


@dataclass(frozen=True, slots=True)
class SectionFooter:
    """The end of a section's body."""

    number: int

    def encode(self) -> bytes:
        """The footer as on the wire."""
        return bytes([Kind.FOOTER]) + self.number.to_bytes(4)


@dataclass(frozen=True, slots=True)
class EndOfStream:
    """Everything was sent but the closing description."""

    def encode(self) -> bytes:
        """One zero byte."""
        return bytes([Kind.EOF])


def parse_header(at: Cursor) -> Parse[Header]:
    """Read the first eight bytes."""
    yield from at.need(4, "the stream's header")
    magic = bytes(at.buffer.peek(4))
    if magic != MAGIC:
        raise at.fail(
            f"the magic {MAGIC!r} of a migration stream",
            repr(magic),
            advice="this is not what QEMU's migrate writes",
        )
    yield from at.need(8, "the stream's header")
    version = int.from_bytes(at.buffer.peek(8)[4:])
    if version != VERSION:
        raise at.fail(
            f"version {VERSION} of the stream",
            f"version {version}",
            advice="version 2 was last written by QEMU 0.15" if version == 2 else None,
        )
    at.buffer.advance(8)
    return Header()


def parse_start(at: Cursor) -> Parse[SectionStart]:
    """Read the head of a START or FULL section; the cursor stands behind its type byte."""
    number = yield from at.number(4, "a section's number")
    name = yield from at.name("a section's name")
    instance = yield from at.number(4, "a section's instance")
    version = yield from at.number(4, "a section's version")
    return SectionStart(number, name, instance, version)
