"""How fast memory is sent, and how fast the machine writes to it: estimates from what was seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_WEIGHT: Final = 0.4
"""What a new sample counts for in the average of the last few."""

_PERIOD: Final = 1.0
"""Seconds that a period is longer than; QEMU 7.2 ``migration_bitmap_sync``."""


class Bandwidth:
    """Bytes per second, from samples of a tenth of a second or more.

    QEMU counts on the last sample alone.  Here it is the smaller of that and the average of the
    last few: one sample that was too good by chance must not make a switchover look short, while
    one that was too bad only costs another look.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._average = 0.0

    @property
    def is_known(self) -> bool:
        """Whether there was a sample."""
        return self._last is not None

    @property
    def value(self) -> float:
        """Bytes per second; 0.0 as long as nothing is known."""
        return 0.0 if self._last is None else min(self._last, self._average)

    def add(self, sent: int, seconds: float) -> None:
        """So many bytes went in so many seconds; nothing is learnt from no time at all."""
        if seconds <= 0:
            return
        rate = sent / seconds
        self._average = (
            rate if self._last is None else _WEIGHT * rate + (1 - _WEIGHT) * self._average
        )
        self._last = rate


@dataclass(frozen=True, slots=True)
class Period:
    """Rounds that took more than a second together: bytes ``sent``, bytes ``dirtied``."""

    sent: int
    dirtied: int
    seconds: float


class Periods:
    """Joins rounds that are too short to judge by."""

    def __init__(self) -> None:
        self._sent = self._dirtied = 0
        self._seconds = 0.0
        self._last: Period | None = None

    def add(self, sent: int, dirtied: int, seconds: float) -> Period | None:
        """A round ended; the period that ended with it, if one did."""
        self._sent += sent
        self._dirtied += dirtied
        self._seconds += seconds
        if self._seconds <= _PERIOD:
            return None
        self._last = Period(self._sent, self._dirtied, self._seconds)
        self._sent = self._dirtied = 0
        self._seconds = 0.0
        return self._last

    @property
    def dirty_rate(self) -> float:
        """Bytes per second that the machine wrote to, in the last period or, in the first, so far.

        A page counts once a round, however often it was written to.
        """
        if self._last is not None:
            return self._last.dirtied / self._last.seconds
        return self._dirtied / self._seconds if self._seconds else 0.0
