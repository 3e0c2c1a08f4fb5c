"""The words of a handover between two engines of this kind, and the destination's wait for them.

QEMU's destination runs the machine and then says so; where that word is lost, its source runs it
too (QEMU 7.2 ``migration/migration.c``).  Between two engines of this kind the last word is the
source's::

    source                                 destination
    PING announce, PING identity ...  -->
    memory, devices, end, description -->  loads everything
                                      <--  PONG ready, PONG identity ...
    PING go                           -->  the machine is the destination's from here on
                                      <--  SHUT 0, and the machine runs

:mod:`.handover` has the rules.  Until it has said *go* a source may take its machine back (it says
*abort* if it can).  A destination that is ready and hears neither is in doubt: it does not run the
machine and keeps its memory, until the source's process is provably dead or an operator decides.
In postcopy the same words stand at other places.  The memory that is missing follows the package,
and may flow before the last word; *go* is a ping in the main channel between two parts of it::

    source                                 destination
    PING announce, PING identity ...  -->
    memory, discards, package         -->  loads the devices, asks for pages that they touch
                                      <--  PONG 3 (the ping in the package): all is loaded
                                      <--  PONG ready, PONG identity ...
    PING go                           -->  the machine is the destination's from here on
                                      <--  PONG go, and the machine runs
    memory ... end                    -->
                                      <--  SHUT 0: everything has come

A destination that is cut off between *ready* and *go* does not run the machine: its migration is
paused.  A source that has said *go*, and that one alone, resumes it, which says so once more: it
announces itself again, and no other one is believed.  To a source that has not announced itself RUN
in the package is the last word, as to a QEMU.

All of it are pings and pongs of QEMU's own format, so that a QEMU at the other end answers, and
otherwise goes its own way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vmferry.errors import PeerError, PeerSilent, TransportError
from vmferry.ownership.identity import Identity
from vmferry.transports import Channel
from vmferry.wire.commands import Ping

ANNOUNCE: Final = int.from_bytes(b"vmfA")
"""A ping: the source hands over as above, and the numbers of its identity follow as pings."""
HEEDS: Final = int.from_bytes(b"vmfH")
"""A pong behind those to the identity: should the machine come by postcopy, it runs at *go*, and
not at once as in a QEMU."""
CHANNELS: Final = int.from_bytes(b"vmfM")
"""A ping: the next one says how many multifd channels the source opens.  Without that a destination
knows only of those that have come, and a proxy may hold some of them up."""
READY: Final = int.from_bytes(b"vmfR")
"""A pong: everything is loaded; the numbers of the destination's identity follow as pongs."""
OWNED: Final = int.from_bytes(b"vmfO")
"""A ping behind the identity: the machine has a record of who owns it
(:mod:`vmferry.ownership`), and :data:`TOKEN` pings follow that say whom it is offered to."""
TOKEN: Final = 2
GRANTED: Final = int.from_bytes(b"vmfT")
"""A ping behind the description, in the place of *go*: a hint that the record grants the machine;
without a record nobody may act on it."""
GO: Final = int.from_bytes(b"vmfG")
"""A ping behind the description: the machine is the destination's."""
ABORT: Final = int.from_bytes(b"vmfX")
"""A ping behind the description: the machine stays the source's."""

_DYING: Final = 1.0
"""Seconds that a process may take to end after its connections did."""

_ASK: Final = 0.1
"""Seconds between two looks at whether the source still lives, in doubt."""


def announcement() -> tuple[int, ...]:
    """The pings by which this process says that it is a source of this kind, and which."""
    return (ANNOUNCE, *Identity.own().numbers())


class Takeover:
    """A destination's wait for the source's last word, on *main*, its main channel."""

    def __init__(self, main: Channel, source: Identity) -> None:
        self._main = main
        self._source = source
        self._deciding = threading.Lock()
        self._decided = threading.Event()
        self._take = False
        self._word = bytearray(len(Ping(GO).encode()))
        self._have = 0
        self._is_cut = False

    def decide(self, *, take: bool) -> None:
        """An operator's word, from any thread: run the machine, or drop it.  The first counts."""
        with self._deciding:
            if not self._decided.is_set():
                self._take = take
                self._decided.set()

    def wait(self, patience: float | None, in_doubt: Callable[[], None]) -> None:
        """Return once the machine is this side's, however long that takes.

        *in_doubt* is called if the source has said nothing for *patience* seconds, or was cut off.
        Raises :class:`PeerError` where the source keeps its machine, or the operator says so.
        """
        deadline = None if patience is None else time.monotonic() + patience
        doubting = False
        while not self._decided.is_set():
            if self._heard_go():
                return
            late = deadline is not None and time.monotonic() > deadline
            if (self._is_cut or late) and self._source.is_dead():
                return
            if (self._is_cut or late) and not doubting:
                doubting = True
                in_doubt()
            if self._is_cut:
                self._decided.wait(_ASK)
        if not self._take:
            raise PeerError("the machine was dropped: its source may have it")

    def wait_for(
        self, taken: Callable[[], bool], patience: float | None, in_doubt: Callable[[], None]
    ) -> None:
        """Return once *taken* says so; it is asked about every tenth of a second.

        For a machine with a record of who owns it: what the source says is only a hint, and no
        silence decides anything.  Raises as :meth:`wait`.
        """
        deadline = None if patience is None else time.monotonic() + patience
        while not taken():
            if self._decided.is_set():
                raise PeerError("the machine was dropped on this side")
            if deadline is not None and time.monotonic() > deadline:
                deadline = None
                in_doubt()
            if self._is_cut or self._have == len(self._word):
                self._decided.wait(_ASK)
            else:
                self._heard_go(GRANTED)

    def _heard_go(self, go: int = GO) -> bool:
        """Listen for a moment."""
        if self._is_cut:
            return False
        try:
            count = self._main.recv_into(memoryview(self._word)[self._have :], _ASK)
        except PeerSilent:
            return False
        except TransportError:
            count = 0
        self._is_cut = count == 0
        self._have += count
        if self._have < len(self._word):
            return False
        if self._word == Ping(go).encode():
            return True
        if self._word == Ping(ABORT).encode():
            raise PeerError("the source has taken its machine back")
        raise PeerError(f"expected the source's last word, found {self._word.hex(' ')}")


def has_died(main: Channel, destination: Identity) -> bool:
    """Whether *destination* is known to have ended; what it said before has come on *main*.

    Over a direct connection, that is: only there nothing is lost.
    """
    return main.peer_pid == destination.pid and destination.dies_within(_DYING)


@contextmanager
def keeping_the_machine(main: Channel) -> Iterator[None]:
    """Tell the destination, where that is possible, if this side fails before its *go*."""
    try:
        yield
    except BaseException:
        # Where that is not heard the destination stays in doubt, and does not run the machine.
        with suppress(TransportError):
            main.send([Ping(ABORT).encode()], _ASK)
        raise
