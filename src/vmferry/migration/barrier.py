"""Keeping multifd channels in step with the main channel.

QEMU 7.2 ``migration/multifd.c`` (``multifd_recv_sync_main``).  A page may be zero on the main
channel in one pass and data on another channel in the next: without the barrier the older could
win.
"""

from __future__ import annotations

import threading
import time

from vmferry.errors import PeerError, StreamError, TransportError


class SyncBarrier:
    """Counts the synchronisations of each channel against those of the main channel.

    A channel that has delivered its *n*-th stops until the main channel has reached its own *n*-th,
    and the main channel stops there until every channel has.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._delivered: dict[int, int] = {}
        self._unsynchronised: set[int] = set()
        self._left: set[int] = set()
        self._expected = 0
        self._released = 0
        self._heard = 0.0
        self._finished = False
        self._broken = False

    @property
    def released(self) -> int:
        """Synchronisations that are behind everyone."""
        return self._released

    def expect(self) -> None:
        """One more channel exists, whose number is not known yet."""
        with self._changed:
            self._expected += 1

    def join(self, channel: int) -> bool:
        """The channel said its number; false where that is taken."""
        with self._changed:
            if channel in self._delivered:
                return False
            self._delivered[channel] = 0
            self._changed.notify_all()
            return True

    def heard(self) -> None:
        """Something came on a channel: the main channel's wait begins anew."""
        self._heard = time.monotonic()

    def begin(self, channel: int) -> None:
        """A channel is about to store pages, which its next synchronisation will cover."""
        with self._changed:
            self._unsynchronised.add(channel)
            if self._finished:
                raise _too_late(channel)

    def deliver(self, channel: int) -> bool:
        """A channel has delivered all before its next synchronisation; waits for the main channel.

        False where the migration was broken off meanwhile.
        """
        with self._changed:
            self._delivered[channel] += 1
            self._unsynchronised.discard(channel)
            mine = self._delivered[channel]
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._broken or self._released >= mine)
            return not self._broken

    def leave(self, channel: int) -> None:
        """The source closed the channel: nothing more comes, and no synchronisation either."""
        with self._changed:
            self._left.add(channel)
            self._changed.notify_all()

    def main(self, timeout: float | None) -> None:
        """The main channel is at its next synchronisation; waits for every channel.

        Raises :class:`TransportError` where all that are waited for say nothing for *timeout*
        seconds, :class:`PeerError` where one was closed.  Returns at once when broken off.
        """
        with self._changed:
            due = self._released + 1
            self._heard = time.monotonic()
            while not self._broken and not self._complete(due):
                if gone := [number for number in self._late(due) if number in self._left]:
                    closed = f"the source closed multifd channel {gone[0]} before synchronisation"
                    raise PeerError(f"{closed} {due}; it failed or was cancelled")
                left = None if timeout is None else self._heard + timeout - time.monotonic()
                if left is not None and left <= 0:
                    raise TransportError(self._waited_for(due, timeout or 0.0))
                self._changed.wait(left)
            self._released = due
            self._changed.notify_all()

    def finish(self) -> None:
        """Guest memory is complete: what came behind a channel's last synchronisation is refused.

        The main channel did not wait for it, so it may be newer or older than what is there.
        """
        with self._changed:
            self._finished = True
            if self._unsynchronised:
                raise _too_late(min(self._unsynchronised))

    def break_off(self) -> None:
        """Wake everybody: the migration has failed."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _complete(self, due: int) -> bool:
        return len(self._delivered) == self._expected and not self._late(due)

    def _late(self, due: int) -> list[int]:
        return [number for number, count in self._delivered.items() if count < due]

    def _waited_for(self, due: int, timeout: float) -> str:
        late = self._late(due)
        silent = self._expected - len(self._delivered)
        who = [f"multifd channel {', '.join(map(str, late))}"] if late else []
        who += [f"{silent} connection(s) that never said who they are"] if silent else []
        return f"waited {timeout:g} s for synchronisation {due} of {' and '.join(who)}"


def _too_late(channel: int) -> StreamError:
    return StreamError(
        "no pages behind the last synchronisation", "some", channel=f"multifd {channel}"
    )
