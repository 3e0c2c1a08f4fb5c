"""Iterable state of the user's own: what a handler does, and how it writes and reads its pieces.

The answer to ``SaveVMHandlers`` of QEMU 7.2 (``migration/register.h``).  A handler's state goes in
pieces of at most ``chunk`` bytes, of which each is the body of one section: the first from
``setup``, then one from each ``iterate``, the last from ``complete``.  The engine frames them
(:mod:`vmferry.wire.framed`), so that their bytes can be any.
"""

from __future__ import annotations

from typing import Protocol

from vmferry.errors import StateError, UsageError


class PieceWriter:
    """A piece that is being written."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self._data = bytearray()

    @property
    def room(self) -> int:
        """Bytes that still fit."""
        return self.chunk - len(self._data)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add *data*; raises :class:`StateError` where it does not fit."""
        size = memoryview(data).nbytes
        if size > self.room:
            raise StateError(
                f"a piece of at most {self.chunk} bytes", f"{len(self._data) + size} or more"
            )
        self._data += data

    def number(self, value: int, size: int) -> None:
        """Add an unsigned number, big-endian in *size* bytes."""
        if not 0 <= value < 1 << 8 * size:
            raise StateError(f"a number of {size} bytes", str(value))
        self.write(value.to_bytes(size))

    def written(self) -> bytes:
        """What was added so far."""
        return bytes(self._data)


class PieceReader:
    """A piece that was received."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._at = 0

    def __len__(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def read(self, size: int) -> bytes:
        """The next *size* bytes; raises :class:`StateError` where there are fewer."""
        if size < 0:
            raise UsageError(f"a size from 0 on, not {size}")
        if size > len(self):
            raise StateError(f"{size} bytes", f"{len(self)}, and the end of the piece")
        self._at += size
        return bytes(self._data[self._at - size : self._at])

    def number(self, size: int) -> int:
        """The next *size* bytes as an unsigned big-endian number."""
        return int.from_bytes(self.read(size))


class Iterative(Protocol):
    """State that is sent in pieces, most of it while the machine still runs.

    Any of the methods may raise :class:`StateError`, or ``ValueError``, which says the same.
    """

    @property
    def name(self) -> str:
        """The section's name."""

    @property
    def version(self) -> int:
        """The version that is written; streams of higher ones are refused."""

    @property
    def chunk(self) -> int:
        """Bytes of one piece at the most, up to 1 MiB.

        Each piece takes as much in the stream, however little was written.
        """

    def setup(self, piece: PieceWriter) -> None:
        """Begin: write what the other side has to know first."""

    def pending(self) -> int:
        """Bytes that are still to be written, roughly; 0 for none.

        While the machine stands still, less and less with the pieces that are written.
        """

    def iterate(self, piece: PieceWriter) -> None:
        """Write some of what is pending."""

    def complete(self, piece: PieceWriter) -> None:
        """Write the last: the machine does not run any more, and nothing is pending."""

    def cleanup(self) -> None:
        """Give up what ``setup`` took; comes once for each ``setup``, whatever happened between."""

    def load(self, piece: PieceReader, version: int) -> None:
        """Take a piece, all of it; pieces come in the order in which they were written."""
