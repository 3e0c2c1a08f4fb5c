"""What stands between the two sides of a move: sockets and threads that end with the test."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack


class Between:
    """Keeps sockets and threads, all of which end with *stack*."""

    def __init__(self, stack: ExitStack) -> None:
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        stack.callback(self._close)

    def _kept(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock

    def _spawn(self, work: Callable[[], None]) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                work()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _close(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            sock.close()
