"""Which chunks of an image were changed: what is still to be copied of a disk that is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import numpy as np

CHUNK: Final = 1 << 20
"""Bytes that are told apart; the last chunk of an image may be shorter."""


class ChangeLog:
    """The chunks of an image of *size* bytes that were changed since they were taken the last time.

    A change is noted when it has been made.  So whoever takes chunks and then reads them has all
    that was noted before, and finds what was being made meanwhile the next time: nothing is lost
    between the two, and behind a drain of the image nothing is missing.

    A context manager, as *stop* ends it.  Any thread may call anything.
    """

    def __init__(self, size: int, stop: Callable[[ChangeLog], None]) -> None:
        self._size = size
        self._marks = bytearray(-(-size // CHUNK))
        self._lock = threading.Lock()
        self._stop = stop

    def note(self, offset: int, length: int) -> None:
        """*length* bytes from *offset* on may be others now."""
        if length:
            first, end = offset // CHUNK, -(-(offset + length) // CHUNK)
            with self._lock:
                self._marks[first:end] = b"\1" * (end - first)

    @property
    def pending(self) -> int:
        """Bytes of the chunks that would be taken now."""
        with self._lock:
            whole = self._marks.count(1) * CHUNK
            return whole - (-self._size % CHUNK if self._marks[-1:] == b"\1" else 0)

    def take(self) -> list[int]:
        """The numbers of the changed chunks, ascending; from now on they count as unchanged."""
        with self._lock:
            found: list[int] = np.flatnonzero(np.frombuffer(self._marks, np.uint8)).tolist()
            self._marks = bytearray(len(self._marks))
        return found

    def close(self) -> None:
        """Note nothing any more.  Idempotent."""
        self._stop(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
