"""Which chunks of an image were changed: what is still to be copied of a disk that is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

CHUNK: Final = 1 << 20
"""Bytes that are told apart unless somebody wants others; the last chunk may be shorter."""


class ChangeLog:
    """The chunks of an image of *size* bytes that were changed since they were taken the last time.

    A chunk has *chunk* bytes.  While ``records`` is off nothing is noted.  ``own``: it is about the
    changes that this side makes, whatever another one does while the image is let go of.

    A change is noted when it has been made.  So whoever takes chunks and then reads them has all
    that was noted before, and finds what was being made meanwhile the next time: nothing is lost
    between the two, and behind a drain of the image nothing is missing.

    A context manager, as *stop* ends it.  Any thread may call anything.
    """

    def __init__(
        self,
        size: int,
        stop: Callable[[ChangeLog], None],
        chunk: int = CHUNK,
        *,
        own: bool = False,
    ) -> None:
        self.own = own
        self._size = size
        self._chunk = chunk
        self._marks = bytearray(-(-size // chunk))
        self.records = True
        self._lock = threading.Lock()
        self._stop = stop

    def note(self, offset: int, length: int) -> None:
        """*length* bytes from *offset* on may be others now."""
        if length and self.records:
            first, end = offset // self._chunk, -(-(offset + length) // self._chunk)
            with self._lock:
                self._marks[first:end] = b"\1" * (end - first)

    @property
    def pending(self) -> int:
        """Bytes of the chunks that would be taken now."""
        with self._lock:
            whole = self._marks.count(1) * self._chunk
            return whole - (-self._size % self._chunk if self._marks[-1:] == b"\1" else 0)

    def take(self) -> list[int]:
        """The numbers of the changed chunks, ascending; from now on they count as unchanged."""
        with self._lock:
            found: list[int] = np.flatnonzero(np.frombuffer(self._marks, np.uint8)).tolist()
            self._marks = bytearray(len(self._marks))
        return found

    def marks(self) -> npt.NDArray[np.uint8]:
        """A copy of what would be taken: 1 for each chunk that was changed."""
        with self._lock:
            return np.frombuffer(bytes(self._marks), np.uint8)

    def merge(self, marks: npt.NDArray[np.uint8]) -> None:
        """Chunks for which *marks*, as of a log of the same size, has a 1 were changed as well."""
        with self._lock:
            np.frombuffer(self._marks, np.uint8)[:] |= marks

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
