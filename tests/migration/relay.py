"""A relay between two sides that can be cut, frozen, or made to cut itself at a certain message."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from vmferry.errors import TransportError
from vmferry.transports import Channel, connect, listen


class Relay:
    """Listens at *uri* and forwards every connection to *target*.

    What comes is forwarded in pieces as read.  The first piece with *trigger* in it is where the
    relay cuts all connections, before or after it has forwarded that piece.
    """

    def __init__(
        self, uri: str, target: str, *, trigger: bytes | None = None, forward: bool = False
    ) -> None:
        self._listener = listen(uri)
        self.address = self._listener.address
        self._target = target
        self._trigger = trigger
        self._forward = forward
        self._ends: list[Channel] = []
        self._threads: list[threading.Thread] = []
        self.has_cut = threading.Event()
        self._spawn(self._accept)

    def cut(self) -> None:
        """Break every connection, and those that are still on their way."""
        self.has_cut.set()
        for end in self._ends:
            end.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._listener.shutdown()
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (*self._ends, self._listener):
            end.close()

    def _spawn(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(Exception):
            while (one := self._listener.accept()) is not None:
                self._ends.append(one)
                try:
                    two = connect(self._target)
                except TransportError:
                    one.shutdown()
                    continue
                self._ends.append(two)
                if self.has_cut.is_set():
                    self.cut()
                self._spawn(lambda one=one, two=two: self._pump(one, two))  # type: ignore[misc]
                self._spawn(lambda one=one, two=two: self._pump(two, one))  # type: ignore[misc]

    def _pump(self, source: Channel, sink: Channel) -> None:
        buffer = memoryview(bytearray(1 << 16))
        try:
            while count := source.recv_into(buffer):
                piece = buffer[:count]
                triggered = self._trigger is not None and self._trigger in bytes(piece)
                if not triggered or self._forward:
                    sink.send([piece])
                if triggered:
                    self.cut()
            sink.end_of_data()
        except TransportError:  # as if there were no relay, both ends know of it
            source.shutdown()
            sink.shutdown()
