"""How far a migration is: plain numbers for a user interface, taken from time to time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

INTERVAL: Final = 0.1
"""Seconds between two reports, at least."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a migration.

    Sizes are in bytes, ``rate`` in bytes per second since the report before, ``elapsed`` in
    seconds since the first byte.  ``round`` counts passes over guest memory from 1; pages of later
    rounds are sent again because the machine wrote to them.
    """

    phase: str
    transferred: int = 0
    ram_total: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    round: int = 0
    rate: float = 0.0
    elapsed: float = 0.0


Report = Callable[[Progress], None]


@dataclass(slots=True)
class Meter:
    """Counts what moves, from any thread, and reports it to *report* every so often."""

    report: Report | None = None
    clock: Callable[[], float] = time.monotonic
    now: Progress = field(default_factory=lambda: Progress("setup"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _started: float = 0.0
    _last: tuple[float, int] = (0.0, 0)

    def start(self) -> None:
        """The first byte is about to move."""
        self._started = self.clock()
        self._last = (self._started, 0)

    def count(self, *, transferred: int = 0, normal: int = 0, zero: int = 0) -> None:
        """Add to the counters."""
        with self._lock:
            self.now = replace(
                self.now,
                transferred=self.now.transferred + transferred,
                normal_pages=self.now.normal_pages + normal,
                zero_pages=self.now.zero_pages + zero,
            )

    def phase(self, phase: str, *, ram_total: int | None = None) -> None:
        """A new phase began."""
        with self._lock:
            total = self.now.ram_total if ram_total is None else ram_total
            self.now = replace(self.now, phase=phase, ram_total=total)
        self.tick(force=True)

    def next_round(self) -> None:
        """A new pass over guest memory began."""
        with self._lock:
            self.now = replace(self.now, round=self.now.round + 1)

    def tick(self, *, force: bool = False) -> None:
        """Report if it is time to."""
        at = self.clock()
        since, transferred = self._last
        if not force and at - since < INTERVAL:
            return
        with self._lock:
            moved = self.now.transferred - transferred
            rate = moved / (at - since) if at > since else 0.0
            self.now = replace(self.now, rate=rate, elapsed=at - self._started)
            self._last = (at, self.now.transferred)
        if self.report is not None:
            self.report(self.now)
