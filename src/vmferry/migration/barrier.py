"""Keeping multifd channels in step with the main channel.

QEMU 7.2 ``migration/multifd.c`` (``multifd_recv_sync_main``).  A page may be zero on the main
channel in one pass and data on another channel in the next: without the barrier the older could
win.
"""

from __future__ import annotations

import threading
import time

from vmferry.errors import TransportError


class SyncBarrier:
    """Counts the synchronisations of each channel against those of the main channel.

    A channel that has delivered its *n*-th stops until the main channel has reached its own *n*-th,
    and the main channel stops there until every channel has.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._delivered: dict[int, int] = {}
        self._expected = 0
        self._released = 0
        self._broken = False

    @property
    def released(self) -> int:
        """Synchronisations that are behind everyone."""
        return self._released

    def expect(self) -> None:
        """One more channel exists, whose number is not known yet."""
        with self._changed:
            self._expected += 1

    def ignore(self) -> None:
        """A channel counted by :meth:`expect` takes no part."""
        with self._changed:
            self._expected -= 1
            self._changed.notify_all()

    def join(self, channel: int) -> bool:
        """The channel said its number; false where that is taken."""
        with self._changed:
            if channel in self._delivered:
                return False
            self._delivered[channel] = 0
            self._changed.notify_all()
            return True

    def deliver(self, channel: int) -> bool:
        """A channel has delivered all before its next synchronisation; waits for the main channel.

        False where the migration was broken off meanwhile.
        """
        with self._changed:
            self._delivered[channel] += 1
            mine = self._delivered[channel]
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._broken or self._released >= mine)
            return not self._broken

    def main(self, timeout: float | None) -> None:
        """The main channel is at its next synchronisation; waits for every channel."""
        with self._changed:
            due = self._released + 1
            deadline = None if timeout is None else time.monotonic() + timeout
            while not self._broken and not self._complete(due):
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TransportError(self._late(due, timeout or 0.0))
                self._changed.wait(left)
            self._released = due
            self._changed.notify_all()

    def _complete(self, due: int) -> bool:
        known = self._delivered.values()
        return len(known) == self._expected and all(count >= due for count in known)

    def _late(self, due: int, timeout: float) -> str:
        late = [str(number) for number, count in self._delivered.items() if count < due]
        silent = self._expected - len(self._delivered)
        who = [f"multifd channel {', '.join(late)}"] if late else []
        who += [f"{silent} connection(s) that never said who they are"] if silent else []
        return f"waited {timeout:g} s for synchronisation {due} of {' and '.join(who)}"

    def break_off(self) -> None:
        """Wake everybody: the migration has failed."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()
