"""A unix socket that records what passes: the end of a migration, or a proxy in front of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

_PART = 1 << 20


@dataclass(slots=True)
class Channel:
    """One connection: what the source sent, and what it was answered."""

    sent: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)


class Recorder:
    """Accepts connections at *path* and records each; ``channels`` in the order of acceptance.

    With a *target*, a unix socket too, each connection is passed on to it, in both directions and
    with half-closes.  Without one, nothing is ever answered.
    """

    def __init__(self, path: Path, target: Path | None = None) -> None:
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.channels: list[Channel] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for end in (self._listener, *self._sockets):
            _shut(end, socket.SHUT_RDWR)
        self.join()
        for end in (self._listener, *self._sockets):
            end.close()

    def join(self, timeout: float = 30.0) -> None:
        """Wait until every connection was closed by its peers; then nothing is missing."""
        for thread in self._threads[1:]:
            thread.join(timeout)
            assert not thread.is_alive(), "a recorded connection is still open"

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                source, _ = self._listener.accept()
            except OSError:  # shut down
                return
            channel = Channel()
            self.channels.append(channel)
            self._sockets.append(source)
            if self._target is None:
                self._start(_pump, source, None, channel.sent)
                continue
            target = socket.socket(socket.AF_UNIX)
            target.connect(str(self._target))
            self._sockets.append(target)
            self._start(_pump, source, target, channel.sent)
            self._start(_pump, target, source, channel.answered)


def _pump(source: socket.socket, target: socket.socket | None, record: bytearray) -> None:
    """Pass on what *source* says until it says no more, and record it."""
    with contextlib.suppress(OSError):  # shut down, or the other side is gone
        while data := source.recv(_PART):
            record += data
            if target is not None:
                target.sendall(data)
    if target is not None:
        _shut(target, socket.SHUT_WR)


def _shut(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        end.shutdown(how)
