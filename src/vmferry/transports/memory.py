"""Two channels in one process, joined by bounded buffers: for tests of everything above.

They behave as a socket pair does: a sender waits while the buffer is full, what was sent before
the end or before a shutdown still arrives, and sending to who no longer listens is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from vmferry.errors import TransportError, printable

from .base import Buffer, Channel, check_room, clogged, closed, sending_after_end, silent
from .gather import Gather

CAPACITY: Final = 256 << 10
"""Bytes on their way in each direction, about what a UNIX socket holds."""


class _Flow:
    """One direction: the bytes on their way, and what each end has said."""

    __slots__ = ("data", "has_ended", "is_abandoned")

    def __init__(self) -> None:
        self.data = bytearray()
        self.has_ended = False
        self.is_abandoned = False


class MemoryChannel(Channel):
    """One end; created by :func:`memory_pair`.  ``changed`` is one lock for both ends."""

    duplex = True

    def __init__(
        self,
        name: str,
        capacity: int,
        changed: threading.Condition,
        incoming: _Flow,
        outgoing: _Flow,
    ) -> None:
        self.name = name
        self._capacity = capacity
        self._changed = changed
        self._incoming = incoming
        self._outgoing = outgoing
        self._is_shut = False

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        check_room(self.name, buffer)
        flow = self._incoming
        with self._changed:
            if not self._await(lambda: bool(flow.data or flow.has_ended), timeout):
                raise silent(self.name, "data", timeout or 0.0)
            count = min(buffer.nbytes, len(flow.data))
            buffer.cast("B")[:count] = flow.data[:count]
            del flow.data[:count]
            self._changed.notify_all()
            return count

    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """See :meth:`Channel.send`."""
        gather = Gather(parts)
        flow = self._outgoing
        with self._changed:
            self._await(lambda: True)
            if flow.has_ended:
                raise sending_after_end(self.name)
            while gather.left:
                if not self._await(
                    lambda: flow.is_abandoned or len(flow.data) < self._capacity, timeout
                ):
                    raise clogged(self.name, timeout or 0.0)
                if flow.is_abandoned:
                    raise TransportError(f"{printable(self.name)}: the other side no longer reads")
                for part in gather.window(self._capacity - len(flow.data)):
                    flow.data += part
                gather.sent(gather.window_size)
                self._changed.notify_all()

    def end_of_data(self) -> None:
        """See :meth:`Channel.end_of_data`."""
        with self._changed:
            self._await(lambda: True)
            self._outgoing.has_ended = True
            self._changed.notify_all()

    def unsent(self) -> int:
        """Bytes that the other end has not received."""
        with self._changed:
            return len(self._outgoing.data)

    def shutdown(self) -> None:
        """See :meth:`Channel.shutdown`."""
        with self._changed:
            self._is_shut = True
            self._outgoing.has_ended = True
            self._incoming.is_abandoned = True
            self._incoming.data.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """See :meth:`Channel.close`."""
        self.shutdown()

    def _await(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for *condition*, false if it takes too long; the lock is held before and after."""
        came = self._changed.wait_for(lambda: self._is_shut or condition(), timeout)
        if self._is_shut:
            raise closed(self.name)
        return came


def memory_pair(capacity: int = CAPACITY) -> tuple[MemoryChannel, MemoryChannel]:
    """Two ends of a pipe; each direction holds *capacity* bytes that nobody has received yet."""
    changed = threading.Condition()
    there, back = _Flow(), _Flow()
    return (
        MemoryChannel("memory 1", capacity, changed, back, there),
        MemoryChannel("memory 2", capacity, changed, there, back),
    )
