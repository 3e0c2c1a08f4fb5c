"""A real-time clock: the host's wall clock in nanoseconds since 1970, UTC.

Writing anything to port 0 takes the time, ports 0 and 4 are the low and the high half of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from vmferry.vmstate import U64, Local, device


@device("real-time-clock", version=1)
@dataclass(slots=True)
class RealTimeClock:
    """The clock; ``taken`` is what the guest reads."""

    taken: U64 = 0
    clock: Local[Callable[[], int]] = time.time_ns

    def read(self, offset: int, size: int) -> int:
        """*size* bytes of the time that was taken."""
        return self.taken >> (8 * offset) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """Take the time."""
        self.taken = self.clock()
