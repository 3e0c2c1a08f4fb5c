"""What a walker says on its serial port, read with deadlines."""

from __future__ import annotations

import re
import socket
import time
from typing import Self

# Whole lines only: the first one after a migration may be the second half of one.
_BEAT = re.compile(r"C ([0-9A-F]{8})", re.IGNORECASE)
_ERROR = re.compile(r"E ([0-9A-F]{8}) ([0-9A-F]{8}) ([0-9A-F]{8})", re.IGNORECASE)


class GuestError(AssertionError):
    """The guest found a page that is not as it left it, or gives no sign of life."""


class Serial:
    """The lines of a walker, read from the socket at the other end of its serial port.

    ``counter`` is the latest heartbeat read, 0 before the first; ``lines`` holds what was read.
    Reading raises GuestError as soon as the guest reports a bad page.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""
        self.lines: list[str] = []
        self.counter = 0

    @classmethod
    def connect(cls, path: str) -> Self:
        """The serial port that is a unix socket at *path* (``-serial unix:path,server=on``)."""
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return cls(connection)

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the guest has stamped every page once."""
        deadline = time.monotonic() + timeout
        while "R" not in self.lines:
            self._read(deadline, "that it is ready")

    def wait_beat(self, after: int = 0, timeout: float = 30.0) -> int:
        """Wait for a heartbeat not yet read whose counter is above *after*; the counter."""
        deadline = time.monotonic() + timeout
        seen = self.counter
        while self.counter <= max(after, seen):
            self._read(deadline, f"that it counts on from {max(after, seen):#x}")
        return self.counter

    def drain(self) -> int:
        """Read what is there, without waiting; the latest counter.

        The guest of a paused machine says nothing more: then this is where it stopped counting.
        """
        while self._receive(0.0):
            pass
        return self.counter

    def _read(self, deadline: float, wanted: str) -> None:
        timeout = max(deadline - time.monotonic(), 0.001)
        if not self._receive(timeout):
            last = ", ".join(self.lines[-3:]) or "nothing"
            raise GuestError(f"the guest does not say {wanted}; its last words: {last}")

    def _receive(self, timeout: float) -> bool:
        """Take in what arrives within *timeout*; whether anything did."""
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(65536)
        except (TimeoutError, BlockingIOError):
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line.decode("ascii", "replace").strip())
        return bool(data)

    def _take(self, line: str) -> None:
        self.lines.append(line)
        if beat := _BEAT.fullmatch(line):
            self.counter = int(beat[1], 16)
        elif error := _ERROR.fullmatch(line):
            page, found, expected = (int(number, 16) for number in error.groups())
            raise GuestError(f"page {page} of the walk holds {found:#x}, not {expected:#x}")
