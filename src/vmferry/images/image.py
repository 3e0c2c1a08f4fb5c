"""What the engine, the devices and the disk migration see of a disk image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from .changes import CHUNK, ChangeLog

Source = bytes | bytearray | memoryview
"""Bytes to be written."""

Target = bytearray | memoryview
"""Where to put bytes that are read."""


@dataclass(frozen=True, slots=True)
class Extent:
    """*length* bytes from *offset* on; without *data* they are zeroes that take no storage."""

    offset: int
    length: int
    data: bool = True

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.length


class Image(Protocol):
    """A disk image: *active*, it belongs to this side; *inactive*, it may belong to another one.

    An inactive image has nothing here that could write to it: no descriptor, no connection, no
    process, and no cache.  So neither :meth:`close` nor the end of this process, however it comes,
    changes it.  Whatever would change it raises :class:`~vmferry.errors.ImageInactive`.

    Offsets and lengths are in bytes.  Any thread may call anything; a change of the state waits
    for the requests in flight, and new ones wait for it.  Errors are
    :class:`~vmferry.errors.StorageError` with the image's name and the cause.
    """

    @property
    def name(self) -> str:
        """Its path or URI."""

    @property
    def size(self) -> int:
        """Bytes, as of when it was opened or last activated or resized."""

    @property
    def active(self) -> bool:
        """Whether it belongs to this side."""

    @property
    def read_only(self) -> bool:
        """Whether it refuses to be changed, be it active or not."""

    @property
    def busy(self) -> bool:
        """Whether its storage is at work for somebody; never waits."""

    def read(self, offset: int, *into: Target) -> None:
        """Fill the buffers *into* one after the other with what stands from *offset* on.

        An inactive image can be read only where nothing is cached on this side.
        """

    def write(self, offset: int, *data: Source, durable: bool = False) -> None:
        """Write the buffers of *data* one behind the other; *durable*: it outlives a power cut."""

    def flush(self) -> None:
        """All that was written before outlives a power cut.

        Where this failed once it fails for ever: what got lost cannot be known.
        """

    def discard(self, offset: int, length: int) -> None:
        """Whatever stands there is not needed; it may read as anything from now on."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make it zeroes, and with *unmap* give the storage back where that is possible."""

    def resize(self, size: int) -> None:
        """Make it *size* bytes long; what is added is zeroes."""

    def allocated(
        self, offset: int = 0, length: int | None = None, *, own: bool = False
    ) -> Iterator[Extent]:
        """Where there may be anything but zeroes, ascending; *length* up to the end if not given.

        With *own* it is where the image has anything itself, zeroes too, in the place of what its
        backing file has.  What is written meanwhile may be in it or not.
        """

    def log_changes(self, chunk: int = CHUNK, *, own: bool = False) -> ChangeLog:
        """Log from now on which chunks are written, zeroed or discarded; until the log is closed.

        They have *chunk* bytes each.  Meanwhile it cannot be resized.  All counts as changed where
        it was let go of meanwhile, unless it is about this side's *own* changes.
        """

    def activate(self) -> None:
        """Take it: its locks, its size and all else that is known of it are read anew.

        Idempotent.  Raises :class:`~vmferry.errors.ImageLocked` where another process has it.
        After any error it is inactive.
        """

    def inactivate(self) -> None:
        """Flush it and let it go: what was written is in the storage, the locks are free.

        Idempotent.  If the flush fails it is still active, and so is a file that has lost its name
        or whose name is another file's by now, as nobody could open it again; after any other error
        it is inactive, but what the format writes at its end may be missing.
        """

    def close(self) -> None:
        """Flush it if it is active, and let it go for good.  Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
