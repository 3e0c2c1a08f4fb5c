"""An interval timer: a counter of nanoseconds of guest time, and an alarm for each vCPU.

Guest time goes on while the machine runs and stands still while it is paused or on its way, so
whoever reads it does not see that the machine was moved.

Each vCPU has registers of its own, of 64 bits, which may be read and written in halves::

    0   counter, read only; reading the low half keeps the high half for the next read of it
    8   alarm: a vCPU that rests runs on when the counter has reached it; 0 for never

and a port, to which it writes anything to rest.  It may run on without the alarm, as after a move.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Final

from vmferry.machines.addresses import TIMER_STRIDE
from vmferry.vmstate import U32, U64, Local, VarArray, device, equal, state

_LOW: Final = 0xFFFFFFFF


@state("interval-timer/channel")
@dataclass(slots=True)
class Channel:
    """What the timer has for one vCPU."""

    alarm: U64 = 0
    high: U32 = 0


@device("interval-timer", version=1)
@dataclass(slots=True)
class IntervalTimer:
    """The timer of a machine with *count* vCPUs; ``clock`` counts the host's nanoseconds.

    ``rest`` is called with the number of a vCPU that is to rest.
    """

    count: Annotated[U32, equal]
    rest: Local[Callable[[int], None]]
    channels: Annotated[list[Channel], VarArray("count", 64)] = field(default_factory=list)
    elapsed: U64 = 0
    """Guest time when the timer was last stopped, in ns."""

    clock: Local[Callable[[], int]] = time.monotonic_ns
    started: Local[int | None] = None

    def __post_init__(self) -> None:
        self.channels = [Channel() for _ in range(self.count)]

    def start(self) -> None:
        """Let guest time go on."""
        if self.started is None:
            self.started = self.clock()

    def stop(self) -> None:
        """Stop guest time."""
        self.elapsed, self.started = self.now(), None

    def now(self) -> int:
        """Guest time in ns."""
        started = self.started
        return self.elapsed if started is None else self.elapsed + self.clock() - started

    def until_alarm(self, index: int) -> float | None:
        """Seconds until the alarm of the vCPU *index*, 0 for past; ``None`` if it has none."""
        alarm = self.channels[index].alarm
        return max(0, alarm - self.now()) / 1e9 if alarm else None

    def read(self, offset: int, size: int) -> int:
        """A register, or half of it."""
        index, register = divmod(offset, TIMER_STRIDE)
        channel = self.channels[index]
        if register >= 8:
            return channel.alarm >> (8 * (register - 8)) & ((1 << 8 * size) - 1)
        if register >= 4:
            return channel.high >> (8 * (register - 4))
        now = self.now()
        channel.high = now >> 32 & _LOW
        return now >> (8 * register) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """The alarm, or half of it."""
        index, register = divmod(offset, TIMER_STRIDE)
        if register >= 8:
            channel, shift = self.channels[index], 8 * (register - 8)
            mask = ((1 << 8 * size) - 1) << shift
            channel.alarm = (channel.alarm & ~mask | value << shift) & (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class RestPorts:
    """The ports of a timer: one for each vCPU."""

    timer: IntervalTimer

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """Nothing is to be read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """Let the vCPU *offset* rest until its alarm."""
        self.timer.rest(offset)
