"""A channel that is read by a thread of its own, ahead of whoever receives from it.

Taking bytes from the kernel costs as much as using them: in two threads the peer waits for neither.
It also makes up for the small buffer of a UNIX socket, of which a read gets 200 KiB at most.
"""

from __future__ import annotations

import threading
from typing import Final

from .base import Channel, check_room, closed, silent
from .wrapped import WrappedChannel

CAPACITY: Final = 4 << 20
"""Bytes that are read ahead: enough to bridge a pause, few enough to stay in a cache."""


class ReadAhead(WrappedChannel):
    """Everything that *channel* receives, in *capacity* bytes of memory until it is asked for.

    The thread reads up to the end of the stream or the first error, and whoever receives meets
    those behind the bytes that came before.  It ends with :meth:`close`.
    """

    def __init__(self, channel: Channel, capacity: int = CAPACITY) -> None:
        super().__init__(channel)
        self._memory = memoryview(bytearray(capacity))
        self._changed = threading.Condition()
        # Counted from the start of the stream; modulo the size of the memory they are places in it.
        self._received = 0
        self._taken = 0
        self._has_ended = False
        self._error: Exception | None = None
        self._is_shut = False
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)
        self._thread.start()

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        check_room(self.name, buffer)
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._is_shut or self._has_ended or self._received > self._taken, timeout
            )
            if self._is_shut:
                raise closed(self.name)
            if not came:
                raise silent(self.name, "data", timeout or 0.0)
            if self._received == self._taken:
                if self._error is not None:
                    raise self._error
                return 0
            at = self._taken % len(self._memory)
            count = min(buffer.nbytes, self._received - self._taken, len(self._memory) - at)
        # The thread does not write there before it is taken.
        buffer.cast("B")[:count] = self._memory[at : at + count]
        with self._changed:
            self._taken += count
            self._changed.notify_all()
        return count

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
        size = len(self._memory)
        with self._changed:
            self._changed.wait_for(lambda: self._is_shut or self._received - self._taken < size)
            if self._is_shut:
                return None
            at = self._received % size
            return self._memory[at : min(size, at + size - (self._received - self._taken))]
