"""A real-time clock: the wall clock of the host, and guest time at the same instant.

Both are in nanoseconds, the one since 1970, UTC.  Writing anything to port 0 takes them; then wall
clock and guest time are read at the ports 0 and 8, their high halves at 4 and 12.  How long guest
time stood still is what their difference has grown by.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmferry.vmstate import U64, Local, device

_TRIES: Final = 5
_SAME: Final = 20_000
"""Nanoseconds within which two clocks count as read at the same instant."""


@device("real-time-clock", version=1)
@dataclass(slots=True)
class RealTimeClock:
    """The clock; ``wall`` and ``guest`` are what was taken last, and what the guest reads."""

    guest_time: Local[Callable[[], int]]
    wall: U64 = 0
    guest: U64 = 0
    clock: Local[Callable[[], int]] = time.time_ns

    def read(self, offset: int, size: int) -> int:
        """*size* bytes of the times that were taken."""
        return (self.guest << 64 | self.wall) >> (8 * offset) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """Take both times."""
        for _ in range(_TRIES):  # another thread may come in between
            self.wall, self.guest = self.clock(), self.guest_time()
            if self.clock() - self.wall < _SAME:
                break
