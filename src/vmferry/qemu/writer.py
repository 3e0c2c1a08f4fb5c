"""Writing what a machine says to a file that may be slow, without the machine noticing."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import BinaryIO, Final, Self

KEPT: Final = 1 << 20
"""Bytes that may wait to be written; what is more is lost."""

_FAREWELL: Final = 1.0
"""Seconds that the rest may take to be written."""


class BackgroundWriter:
    """Writes to *file* in a thread of its own; a context manager, closed at the end.

    When nobody reads it any more, or the disk is full, what comes is dropped.  *file* is not
    closed, and unbuffered so that it gets what there is at once.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._closing = False
        self.lost = 0
        """Bytes that were not kept."""
        self._thread = threading.Thread(target=self._run, name="serial", daemon=True)
        self._thread.start()

    def feed(self, data: bytes) -> None:
        """Have *data* written; from any thread, without waiting for that."""
        with self._changed:
            if self._closing or self._size + len(data) > KEPT:
                self.lost += len(data)
                return
            self._waiting.append(data)
            self._size += len(data)
            self._changed.notify()

    def close(self) -> None:
        """Wait until the rest is written, a second at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_FAREWELL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        while data := self._next():
            # Nobody reads it, there is no room, or it was closed without waiting any longer.
            with suppress(OSError, ValueError):
                while data:
                    data = data[self._file.write(data) :]

    def _next(self) -> bytes:
        """What is to be written; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            data = b"".join(self._waiting)
            self._waiting.clear()
            self._size = 0
            return data
