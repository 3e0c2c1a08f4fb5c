"""A process that ends itself at a given time, even if it is frozen then."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from typing import Final

from vmferry.errors import MachineError

_SIGEV_SIGNAL: Final = 0


class _Event(ctypes.Structure):
    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Setting(ctypes.Structure):
    _fields_ = (("interval", _Time), ("value", _Time))


def now() -> float:
    """Seconds by the clock that goes on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class DeadMan:
    """A timer of the kernel that sends SIGKILL to this process.

    It needs nothing of the process, so that one that is stopped (SIGSTOP) or swapped out ends too;
    a host that slept ends it on waking, before it runs (``timer_create(2)``, ``CLOCK_BOOTTIME``).
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._timer = ctypes.c_void_p()
        event = _Event(None, signal.SIGKILL, _SIGEV_SIGNAL)
        clock = time.CLOCK_BOOTTIME
        if self._libc.timer_create(clock, ctypes.byref(event), ctypes.byref(self._timer)):
            raise MachineError(f"no timer: {os.strerror(ctypes.get_errno())}")

    def arm(self, at: float | None) -> None:
        """Kill this process at *at* of :func:`now` instead; ``None`` is never."""
        seconds = 0.0 if at is None else max(at, 0.001)
        whole = int(seconds)
        setting = _Setting(_Time(0, 0), _Time(whole, int((seconds - whole) * 1e9)))
        absolute = 1
        if self._libc.timer_settime(self._timer, absolute, ctypes.byref(setting), None):
            raise MachineError(f"no timer: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Never kill it."""
        self._libc.timer_delete(self._timer)
