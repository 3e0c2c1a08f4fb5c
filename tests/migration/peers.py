"""The other end of a QEMU's migration, where it does not matter what comes there."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Self

from tests.transports.support import PROMPT
from vmferry.wire.reader import StreamReader, Tolerate

LONG = 60.0
SHUT = bytes.fromhex("0001000400000000")


class Peer:
    """Accepts one connection and reads what comes, for as long as the block lasts.

    *tolerate* as for the reader: where memory follows the machine it has no end of its own.
    """

    def __init__(self, path: Path, tolerate: Tolerate = Tolerate.NOTHING) -> None:
        self._tolerate = tolerate
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._connection: Future[socket.socket] = Future()
        self._whole = threading.Event()
        self.uri = f"unix:{path}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        if self._connection.done():
            self._connection.result().close()

    def say(self, message: bytes) -> None:
        """Answer the source."""
        self._connection.result(PROMPT).sendall(message)

    def confirm(self) -> None:
        """Say that the machine is loaded, once all of it has come.

        A QEMU 7.2 that hears so earlier closes the connection that it still sends on, and fails.
        """
        assert self._whole.wait(LONG)
        self.say(SHUT)

    def hang_up(self) -> None:
        """Break the connection."""
        self._connection.result(PROMPT).shutdown(socket.SHUT_RDWR)

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            connection = self._listener.accept()[0]
            self._connection.set_result(connection)
            reader = StreamReader(tolerate=self._tolerate)
            while data := connection.recv(1 << 20):
                for _ in reader.feed(data):
                    pass
                if reader.finished:
                    self._whole.set()


@contextlib.contextmanager
def unanswered() -> Iterator[str]:
    """An address where no connection comes about: its queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as fill:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = fill.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"
