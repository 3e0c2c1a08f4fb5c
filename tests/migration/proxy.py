"""A network between two sides, on loopback, that breaks as networks do."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from enum import StrEnum
from types import TracebackType
from typing import Self


class Break(StrEnum):
    """What both sides see of it."""

    RESET = "reset"
    CLOSE = "close"
    BLACK_HOLE = "black-hole"
    """Nothing: what they send is taken, and comes nowhere."""


class Proxy:
    """Forwards connections to *port*, until it is broken."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._broken: Break | None = None
        self._spawn(self._accept)

    @property
    def uri(self) -> str:
        """Where a source thinks that its destination is."""
        return f"tcp:127.0.0.1:{self._server.getsockname()[1]}"

    def break_off(self, how: Break) -> None:
        """Break all connections, for good."""
        self._broken = how
        for end in self._ends:
            with contextlib.suppress(OSError):  # one side may be gone
                match how:
                    case Break.RESET:
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        end.shutdown(socket.SHUT_RD)  # whoever reads here wakes, and closes
                    case Break.CLOSE:
                        end.shutdown(socket.SHUT_RDWR)
                    case Break.BLACK_HOLE:
                        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._server.close()

    def _spawn(self, work: Callable[..., None], *args: socket.socket) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self._server.accept()
                two = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [one, two]
                self._spawn(self._pump, one, two)
                self._spawn(self._pump, two, one)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self._broken is None:
                    sink.sendall(data)
            if self._broken is None:
                sink.shutdown(socket.SHUT_WR)
