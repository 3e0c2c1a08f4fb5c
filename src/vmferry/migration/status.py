"""The statuses of a migration, under QEMU's names, and which may follow which.

QEMU 7.2 ``migration/migration.c`` and ``qapi/migration.json``.  The laws that both tables keep,
each of them a test:

* Every migration begins at ``none`` with ``setup``.
* From every status that is under way an end can be reached, and ``failed`` at once unless the
  migration is being cancelled.
* A source may begin again from every end.  A destination is of use once.
* A source can be cancelled while it is under way and has the machine, and at no other time: not in
  postcopy.  What follows then is ``cancelled`` and nothing else.
* ``completed`` is final for the attempt: no late cancel and no late failure takes it back.

Who may run the machine is not said here: a source is ``active`` before and behind the point of no
return.  That is in :mod:`~vmferry.migration.handover`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Final

from vmferry.errors import UsageError


class Status(StrEnum):
    """``status`` of ``query-migrate`` and of the event ``MIGRATION``."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    PRE_SWITCHOVER = "pre-switchover"
    DEVICE = "device"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SENT = "sent"
    """Not QEMU's: everything is sent, and nobody says whether it has arrived.  A QEMU that has no
    return path says ``completed`` of that."""


Table = Mapping[Status, frozenset[Status]]

_SETUP: Final = frozenset({Status.SETUP})
_DONE: Final = frozenset({Status.COMPLETED, Status.SENT})
_BREAKS_OFF: Final = frozenset({Status.FAILED, Status.CANCELLING})

_POSTCOPY: Final[Table] = {
    Status.POSTCOPY_ACTIVE: frozenset({Status.POSTCOPY_PAUSED, Status.COMPLETED, Status.FAILED}),
    Status.POSTCOPY_PAUSED: frozenset({Status.POSTCOPY_RECOVER, Status.FAILED}),
    Status.POSTCOPY_RECOVER: frozenset(
        {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.FAILED}
    ),
}

# ``colo`` and ``wait-unplug`` are not ours.
#
# One row is not QEMU's: pre-switchover to failed.  A QEMU that waits there does not see that its
# peer has gone before it is told to go on, and keeps the machine stopped as long.
SOURCE: Final[Table] = {
    Status.NONE: _SETUP,
    Status.SETUP: frozenset({Status.ACTIVE}) | _BREAKS_OFF,
    Status.ACTIVE: (
        frozenset({Status.PRE_SWITCHOVER, Status.POSTCOPY_ACTIVE}) | _DONE | _BREAKS_OFF
    ),
    Status.PRE_SWITCHOVER: frozenset({Status.DEVICE}) | _BREAKS_OFF,
    Status.DEVICE: frozenset({Status.POSTCOPY_ACTIVE}) | _DONE | _BREAKS_OFF,
    **_POSTCOPY,
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    Status.COMPLETED: _SETUP,
    Status.FAILED: _SETUP,
    Status.CANCELLED: _SETUP,
    Status.SENT: _SETUP,
}
"""A source: ``pre-switchover`` and ``device`` only with ``pause-before-switchover``.

``postcopy-active`` from when the machine is the destination's on, ``postcopy-paused`` while that is
lost, and ``postcopy-recover`` from when it is sought again until it goes on."""

# QEMU 7.2 announces setup in an event and shows it in no query; from 8.2 on it is as here.
DESTINATION: Final[Table] = {
    Status.NONE: _SETUP,
    Status.SETUP: frozenset({Status.ACTIVE, Status.FAILED}),
    Status.ACTIVE: frozenset({Status.POSTCOPY_ACTIVE, Status.COMPLETED, Status.FAILED}),
    **_POSTCOPY,
    Status.COMPLETED: frozenset(),
    Status.FAILED: frozenset(),
}
"""A destination: ``setup`` while it listens, ``active`` from the first connection on.

``postcopy-active`` from when it misses pages on, ``postcopy-paused`` while their source is lost,
and ``postcopy-recover`` from when that is back until it goes on."""

ENDS: Final = frozenset({Status.COMPLETED, Status.SENT, Status.FAILED, Status.CANCELLED})
"""Where a migration is over."""

POSTCOPY: Final = frozenset(_POSTCOPY)
"""Where the machine is the destination's, and some of its memory still at the source."""

UNDER_WAY: Final = frozenset(Status) - ENDS - {Status.NONE}
"""Where a migration is in progress: capabilities are fixed, and no other can begin."""


class StatusTrack:
    """The status of one side, changed by any thread along *table* and in no other way.

    *listener* is told every new status, in order.  It is called by the thread that changed it, with
    the track locked: it may ask for :attr:`current`, and has to be quick.  *lock*, a reentrant one,
    is for a listener that needs another lock as well: with that one there is only one.
    """

    def __init__(
        self,
        table: Table,
        listener: Callable[[Status], None] | None = None,
        *,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._table = table
        self._listener = listener
        self._lock = lock or threading.RLock()
        self._current = Status.NONE

    @property
    def current(self) -> Status:
        """The status now; another thread may change it at any moment."""
        return self._current

    def move(self, to: Status) -> None:
        """Go on to *to*; raises :class:`~vmferry.errors.UsageError` where it may not follow."""
        with self._lock:
            self._go(to)

    def move_if(self, current: Status, to: Status) -> bool:
        """Go on to *to* if the status is *current*; false where another thread was quicker.

        Raises :class:`~vmferry.errors.UsageError` where *to* may not follow *current*.
        """
        with self._lock:
            if self._current != current:
                return False
            self._go(to)
            return True

    def _go(self, to: Status) -> None:
        may_follow = self._table[self._current]
        if to not in may_follow:
            allowed = " or ".join(sorted(may_follow)) or "nothing"
            raise UsageError(f"behind {self._current} comes {allowed}, not {to}")
        self._current = to
        if self._listener is not None:
            self._listener(to)
