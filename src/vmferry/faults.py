"""Named points at which a test makes a process die, freeze or fail, to see what becomes of all.

``VMFERRY_FAULT=go-said:kill`` arms one point of a process; without it :func:`reach` does nothing.
``kill``, ``stop`` and ``fail`` say what they do; with ``delay`` the thread alone stands still.
The points are where the code says so; each is reached once in a migration or not at all.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Final

from vmferry.errors import UsageError, VmferryError

_VARIABLE: Final = "VMFERRY_FAULT"

_SIGNALS: Final = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

_DELAY: Final = 5.0
"""Seconds, which is longer than the shortest terms of leases."""

POINTS: Final = frozenset(
    {
        # of a source
        "connected",
        "round-sent",
        "stopped",
        "images-inactive",
        "devices-sent",
        "offered",
        "ready-heard",
        "go-said",
        "shut-heard",
        "discards-sent",
        "package-sent",
        "loaded-heard",
        "reconnected",
        "back",
        # of a destination
        "memory-known",
        "pages-stored",
        "loaded",
        "ready-said",
        "go-heard",
        "images-active",
        "shut-said",
        "running",
        # of whoever changes the record of the machine's owner, before and after each change
        *(
            f"{act}-{when}"
            for act in ("claim", "offer", "grant", "revoke", "take", "start", "return")
            for when in ("asked", "landed")
        ),
    }
)


def _armed() -> tuple[str, str]:
    point, _, action = os.environ.get(_VARIABLE, "").partition(":")
    if point and (point not in POINTS or action not in {*_SIGNALS, "fail", "delay"}):
        raise UsageError(
            f"{_VARIABLE}: expected POINT:kill, :stop, :fail or :delay with a point of"
            f" {', '.join(sorted(POINTS))}, found {point}:{action}"
        )
    return point, action


_point, _action = _armed()


def reach(point: str) -> None:
    """Do here what the environment asks for, if it asks for *point*.

    ``fail`` raises a :class:`~vmferry.errors.VmferryError`.
    """
    if point != _point:
        return None
    if _action == "fail":
        raise VmferryError(f"{_VARIABLE} asked for a failure at {point}")
    if _action == "delay":
        return time.sleep(_DELAY)
    # To the thread itself, so that it does not come a step further.
    return signal.pthread_kill(threading.get_ident(), _SIGNALS[_action])
