"""A channel that is read by a thread of its own, ahead of whoever receives from it.

Taking bytes from the kernel costs as much as using them: in two threads the peer waits for neither.
It also makes up for the small buffer of a UNIX socket, of which a read gets 200 KiB at most.
"""

from __future__ import annotations

import mmap
import threading
from typing import Final

from vmferry.wire.buffer import ReceiveBuffer

from .base import Channel, check_room, closed, silent
from .wrapped import WrappedChannel

CAPACITY: Final = 4 << 20
"""Bytes that are read ahead: enough to bridge a pause, few enough to stay in a cache."""

_HEAD: Final = 64 << 10
"""Bytes before the memory, for what still waits at its end when its beginning is lent."""


class ReadAhead(WrappedChannel):
    """Everything that *channel* receives, in *capacity* bytes of memory until it is asked for.

    The thread reads up to the end of the stream or the first error, and whoever receives meets
    those behind the bytes that came before.  It ends with :meth:`close`.
    """

    def __init__(self, channel: Channel, capacity: int = CAPACITY) -> None:
        super().__init__(channel)
        self._size = capacity
        # Page by page the kernel copies faster to where pages begin.
        self._memory = memoryview(mmap.mmap(-1, _HEAD + capacity))
        self._changed = threading.Condition()
        # Counted from the start of the stream; modulo the size of the memory they are places in it.
        self._received = 0
        self._given = 0
        self._taken = 0
        self._has_ended = False
        self._error: Exception | None = None
        self._is_shut = False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        check_room(self.name, buffer)
        at, count = self._await(timeout)
        count = min(buffer.nbytes, count)
        # The thread does not write there before it is taken.
        buffer.cast("B")[:count] = self._memory[at : at + count]
        self._take(count, 0)
        return count

    def receive(self, buffer: ReceiveBuffer, timeout: float | None = None) -> int:
        """As :meth:`recv_into` its room, without a copy where *buffer* can borrow the memory.

        It has the memory up to the next call of either.
        """
        if buffer.borrows:
            if len(buffer) > self._size // 2:
                buffer.room()  # the memory is full, and more has to come
            self._take(0, len(buffer) if buffer.borrows else 0)
        at, count = self._await(timeout)
        held = len(buffer)
        if count and held and buffer.borrows and at == _HEAD and held <= _HEAD:
            self._memory[_HEAD - held : _HEAD] = buffer.view()
        elif not count or (held and not (buffer.borrows and at != _HEAD)):
            room = buffer.room()
            count = min(len(room), count)
            room[:count] = self._memory[at : at + count]
            buffer.received(count)
            self._take(count, 0)
            return count
        buffer.borrow(self._memory, at - held, at + count)
        self._take(count, held + count)
        return count

    def _await(self, timeout: float | None) -> tuple[int, int]:
        """Where in the memory there is more, and how many bytes; 0 at the end of the stream."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._is_shut or self._has_ended or self._received > self._given, timeout
            )
            if self._is_shut:
                raise closed(self.name)
            if not came:
                raise silent(self.name, "data", timeout or 0.0)
            at = self._given % self._size
            if self._received == self._given:
                if self._error is not None:
                    raise self._error
                return _HEAD + at, 0
            return _HEAD + at, min(self._received - self._given, self._size - at)

    def _take(self, count: int, kept: int) -> None:
        """So many bytes were given, and of all that were, the last *kept* are still needed."""
        with self._changed:
            self._given += count
            self._taken = self._given - kept
            self._changed.notify_all()

    def shutdown(self) -> None:
        """See :meth:`Channel.shutdown`."""
        with self._changed:
            self._is_shut = True
            self._changed.notify_all()
        super().shutdown()

    def close(self) -> None:
        """See :meth:`Channel.close`; waits for the thread, which then ends at once."""
        self.shutdown()
        super().close()
        self._thread.join()
        self._memory = memoryview(b"")

    def _run(self) -> None:
        try:
            while (room := self._room()) is not None:
                count = self._channel.recv_into(room)
                with self._changed:
                    self._received += count
                    self._has_ended = not count
                    self._changed.notify_all()
                if not count:
                    return
        except Exception as error:  # noqa: BLE001 - raised by whoever receives
            with self._changed:
                self._error, self._has_ended = error, True
                self._changed.notify_all()

    def _room(self) -> memoryview | None:
        """Free memory, waited for; ``None`` after a shutdown."""
        size = self._size
        with self._changed:
            self._changed.wait_for(lambda: self._is_shut or self._received - self._taken < size)
            if self._is_shut:
                return None
            at = self._received % size
            end = min(size, at + size - (self._received - self._taken))
            return self._memory[_HEAD + at : _HEAD + end]
