"""Every error that vmferry raises, and the exit status of the command for each.

::

    VmferryError                1
    ├── UsageError              2   asked for what cannot be: an option, a URI, an order of calls
    │   └── DeclarationError        a class declares a state that cannot be
    ├── StreamError             3   the bytes of a migration stream break a rule
    │   ├── TruncatedStream         the input ended inside something
    │   ├── LimitExceeded           a number in the stream is above what the reader allows
    │   └── StateError              a device's state does not fit its declaration, saving or loading
    ├── TransportError          4   a channel could not be opened, broke, or went silent
    │   ├── ChannelClosed           this side shut the channel down while it was in use
    │   ├── CommandFailed           a command that was to take or to give the stream has said so
    │   └── PeerSilent              the other side said nothing for as long as it was given
    ├── PeerError               4   the other side refused, failed, or broke the order
    │   ├── Refused                 the destination has said that it does not have the machine
    │   └── InDoubt                 it cannot be known which side has the machine
    ├── MachineError            1   a machine that vmferry hosts cannot go on
    └── StorageError            5   a file, a disk image or a checkpoint directory
        ├── ImageInactive           an image that is inactive on this side was to be used
        ├── ImageLocked             another process has the image and does not share it
        ├── CheckpointIncomplete    its writer never finished it
        └── CheckpointDamaged       its content does not match its manifest

A message says what was expected, what was found, where, and where it helps what to do.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final


class VmferryError(Exception):
    """Base of everything that vmferry raises on purpose."""

    exit_status: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``: ``kind``, the name of the class, and ``message``."""
        return {"kind": type(self).__name__, "message": str(self)}


class UsageError(VmferryError):
    """The caller asked for something that cannot be done as asked."""

    exit_status = 2


class DeclarationError(UsageError):
    """A class declares a state that cannot be saved or loaded; names the class and the field."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a migration a fault was found; filled in by whoever knows it, inside out.

    ``offset`` counts bytes from the start of ``channel``.  Names come from the stream, so they
    are shown escaped.
    """

    channel: str | None = None
    offset: int | None = None
    section: str | None = None
    block: str | None = None

    def or_else(self, outer: Place) -> Place:
        """What is known here, and the rest from *outer*."""
        return Place(
            channel=self.channel if self.channel is not None else outer.channel,
            offset=self.offset if self.offset is not None else outer.offset,
            section=self.section if self.section is not None else outer.section,
            block=self.block if self.block is not None else outer.block,
        )

    def __str__(self) -> str:
        known = []
        if self.channel is not None:
            known.append(f"channel {printable(self.channel)}")
        if self.offset is not None:
            known.append(f"byte {self.offset:#x}")
        if self.section is not None:
            known.append(f"section {printable(self.section)}")
        if self.block is not None:
            known.append(f"block {printable(self.block)}")
        return ", ".join(known)


class StreamError(VmferryError):
    """The bytes break a rule of the stream: what was expected, what was found, and where."""

    exit_status = 3

    def __init__(
        self,
        expected: str,
        found: str,
        *,
        channel: str | None = None,
        offset: int | None = None,
        section: str | None = None,
        block: str | None = None,
        advice: str | None = None,
    ) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found
        self.advice = advice
        self.place = Place(channel=channel, offset=offset, section=section, block=block)

    def within(
        self,
        *,
        channel: str | None = None,
        offset: int | None = None,
        section: str | None = None,
        block: str | None = None,
    ) -> StreamError:
        """Add what an outer layer knows of the place; what is known already stays."""
        self.place = self.place.or_else(Place(channel, offset, section, block))
        return self

    def to_json(self) -> dict[str, Any]:
        """Also ``expected``, ``found``, ``advice`` and the place; ``null`` where not known."""
        return super().to_json() | {
            "expected": self.expected,
            "found": self.found,
            "advice": self.advice,
            "channel": self.place.channel,
            "offset": self.place.offset,
            "section": self.place.section,
            "block": self.place.block,
        }

    def __str__(self) -> str:
        text = f"expected {self.expected}, found {self.found}"
        if place := str(self.place):
            text += f" ({place})"
        if self.advice:
            text += f"; {self.advice}"
        return text


class TruncatedStream(StreamError):
    """The input ended before the stream did."""


class LimitExceeded(StreamError):
    """A length or count in the stream is above the limit set for it."""


class StateError(StreamError):
    """The state of a device does not fit its declaration, when saving or when loading.

    ``field`` is the path of the field, as in ``timer.channels[3].mode``.
    """

    def __init__(self, expected: str, found: str, *, field: str = "") -> None:
        super().__init__(expected, found)
        self.field = field

    def inside(self, outer: str) -> StateError:
        """Add the field, or the index in brackets, that the path so far lies in."""
        self.field = outer + ("." if self.field[:1] not in {"", "["} else "") + self.field
        return self

    def to_json(self) -> dict[str, Any]:
        """Also ``field``."""
        return super().to_json() | {"field": self.field}

    def __str__(self) -> str:
        return f"{self.field}: {super().__str__()}" if self.field else super().__str__()


class TransportError(VmferryError):
    """A channel could not be opened, broke, or stayed silent for too long."""

    exit_status = 4


class ChannelClosed(TransportError):
    """The channel was shut down on this side, by another thread or before the call."""


class CommandFailed(TransportError):
    """A command at the other end of a channel has ended with a status that says that it failed."""


class PeerSilent(TransportError):
    """The other side said nothing for as long as it was given; the channel is as it was."""


class PeerError(VmferryError):
    """The other side of the migration refused, failed, or broke the order of things."""

    exit_status = 4


class Refused(PeerError):
    """The destination has said that it failed, and does not have the machine."""


class InDoubt(PeerError):
    """It cannot be known which side has the machine: it does not run here, its memory is kept."""


class MachineError(VmferryError):
    """A machine that vmferry hosts cannot start or go on: its host failed it, or its guest."""


class StorageError(VmferryError):
    """A file or directory could not be read or written as asked."""

    exit_status = 5
    no_space = False
    """Whether it was for want of room, which an operator can make."""


class ImageInactive(StorageError):
    """The image is inactive on this side: nothing was read from it or written to it.

    A storage error, as for a guest that still writes it is what any disk that fails is.
    """


class ImageLocked(StorageError):
    """Another process uses the image, on this host or wherever its file system has locks."""


class CheckpointIncomplete(StorageError):
    """The directory holds a checkpoint whose writer never finished it."""


class CheckpointDamaged(StorageError):
    """The files of a checkpoint do not match its manifest."""


_STORAGE_ADVICE: Final = {
    errno.ENOSPC: "; free some space or choose another file system",
    errno.EDQUOT: "; free some space or have the quota raised",
}


def storage_error(where: str | Path, doing: str, error: OSError | int) -> StorageError:
    """What to raise for an *error* of the file system: *where* cannot be done what was tried."""
    if isinstance(error, int):
        error = OSError(error, os.strerror(error))
    advice = _STORAGE_ADVICE.get(error.errno or 0, "")
    found = StorageError(f"{where}: cannot be {doing}: {error.strerror or error}{advice}")
    found.no_space = bool(advice)
    return found


def printable(name: str | bytes, limit: int = 255) -> str:
    """A name as quoted text, escaped and shortened, safe for a terminal or a log.

    The usual *limit* is the most that a name on the wire has; most paths are whole, too.
    """
    if isinstance(name, bytes):
        name = name.decode("utf-8", "backslashreplace")
    shown = name if len(name) <= limit else name[: limit - 1] + "…"
    quoted = "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in shown)
    return f'"{quoted}"'


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii") if char != '"' else '\\"'
