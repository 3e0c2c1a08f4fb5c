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

    Phases are ``setup``, ``active``, ``device`` (sending only), ``storing`` or ``loading``, and one
    of ``completed``, ``sent`` (where nobody answers) and ``failed``.  Sizes are in bytes, ``rate``
    in bytes per second since the report before, ``elapsed`` in seconds since the first byte.
    ``ram_total`` and ``page_size`` are 0 until guest memory is known.  ``round`` counts passes over
    it from 1; pages of later rounds are sent again because the machine wrote to them.
    """

    phase: str
    transferred: int = 0
    ram_total: int = 0
    page_size: int = 0
    normal_pages: int = 0
    zero_pages: int = 0
    round: int = 0
    rate: float = 0.0
    elapsed: float = 0.0


Report = Callable[[Progress], None]


@dataclass(slots=True)
class Meter:
    """Counts what moves, from any thread, and reports it to *report* every so often.

    *report* is called from whatever thread moves something, but never by two at once.
    """

    report: Report | None = None
    clock: Callable[[], float] = time.monotonic
    now: Progress = field(default_factory=lambda: Progress("setup"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _reporting: threading.Lock = field(default_factory=threading.Lock)
    _started: float | None = None
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

    def phase(self, phase: str) -> None:
        """A new phase began."""
        with self._lock:
            self.now = replace(self.now, phase=phase)
        self.tick(force=True)

    def active(self, ram_total: int, page_size: int) -> None:
        """Guest memory is known, and begins to move."""
        with self._lock:
            self.now = replace(self.now, ram_total=ram_total, page_size=page_size)
        self.phase("active")

    def next_round(self) -> None:
        """A new pass over guest memory began."""
        with self._lock:
            self.now = replace(self.now, round=self.now.round + 1)

    def tick(self, *, force: bool = False) -> None:
        """Report if it is time to."""
        if not force and self.clock() - self._last[0] < INTERVAL:
            return
        if not self._reporting.acquire(blocking=force):
            return
        try:
            self._report()
        finally:
            self._reporting.release()

    def _report(self) -> None:
        at = self.clock()
        since, transferred = self._last
        with self._lock:
            moved = self.now.transferred - transferred
            rate = moved / (at - since) if at > since else 0.0
            elapsed = 0.0 if self._started is None else at - self._started
            self.now = replace(self.now, rate=rate, elapsed=elapsed)
            self._last = (at, self.now.transferred)
        if self.report is not None:
            self.report(self.now)
