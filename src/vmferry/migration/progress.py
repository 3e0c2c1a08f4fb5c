"""How far a migration is: plain numbers for a user interface, taken from time to time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

INTERVAL: Final = 0.1
"""Seconds between two reports, at least."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a migration.

    Phases are ``setup``, ``active``, ``device`` (sending only), ``postcopy-active`` (the machine
    runs at the destination), ``storing`` or ``loading``, and one of ``completed``, ``sent`` (where
    nobody answers) and ``failed``.  Sizes are in bytes, ``rate``
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


@dataclass(slots=True)
class Counters:
    """What has moved so far.

    ``transferred`` counts bytes on all channels, ``multifd`` those of them on multifd channels,
    ``disk`` those of chunks of disks.
    ``xbzrle_pages`` were found in the cache and became ``xbzrle_bytes``; the differences of
    ``xbzrle_overflows`` of them took more than a page, which was sent as a normal one.
    ``xbzrle_misses`` were not in the cache.
    """

    transferred: int = 0
    multifd: int = 0
    disk: int = 0
    normal: int = 0
    zero: int = 0
    xbzrle_pages: int = 0
    xbzrle_bytes: int = 0
    xbzrle_misses: int = 0
    xbzrle_overflows: int = 0

    @property
    def ram(self) -> int:
        """Bytes that were not those of disks."""
        return self.transferred - self.disk

    @property
    def pages(self) -> int:
        """Pages that were dealt with; those whose differences overflow are normal ones too."""
        return self.normal + self.zero + self.xbzrle_pages - self.xbzrle_overflows


Report = Callable[[Progress], None]


class Meter:
    """Counts what moves, from any thread, and reports it to *report* every so often.

    *report* is called from whatever thread moves something, but never by two at once.
    """

    def __init__(
        self, report: Report | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._report_to = report
        self._clock = clock
        self._lock = threading.Lock()
        self._reporting = threading.Lock()
        self._phase = "setup"
        self._counters = Counters()
        self._ram_total = self._page_size = self._round = 0
        self._rate = 0.0
        self._started: float | None = None
        self._last = (0.0, 0)

    def start(self) -> None:
        """The first byte is about to move."""
        self._started = self._clock()
        self._last = (self._started, 0)

    def count(
        self,
        *,
        transferred: int = 0,
        multifd: int = 0,
        disk: int = 0,
        normal: int = 0,
        zero: int = 0,
        xbzrle_pages: int = 0,
        xbzrle_bytes: int = 0,
        xbzrle_misses: int = 0,
        xbzrle_overflows: int = 0,
    ) -> None:
        """Add to the counters, which are those of :class:`Counters`."""
        counters = self._counters
        with self._lock:
            counters.transferred += transferred
            counters.multifd += multifd
            counters.disk += disk
            counters.normal += normal
            counters.zero += zero
            counters.xbzrle_pages += xbzrle_pages
            counters.xbzrle_bytes += xbzrle_bytes
            counters.xbzrle_misses += xbzrle_misses
            counters.xbzrle_overflows += xbzrle_overflows

    def counters(self) -> Counters:
        """The counters as they are now, all of the same moment."""
        with self._lock:
            return replace(self._counters)

    def phase(self, phase: str) -> None:
        """A new phase began."""
        self._phase = phase
        self.tick(force=True)

    def active(self, ram_total: int, page_size: int) -> None:
        """Guest memory is known, and begins to move."""
        self._ram_total, self._page_size = ram_total, page_size
        self.phase("active")

    @property
    def round(self) -> int:
        """Passes over guest memory that have begun."""
        return self._round

    def next_round(self) -> None:
        """A new pass over guest memory began."""
        self._round += 1

    def tick(self, *, force: bool = False) -> None:
        """Report if it is time to."""
        if not force and self._clock() - self._last[0] < INTERVAL:
            return
        if not self._reporting.acquire(blocking=force):
            return
        try:
            now = self._now()
            if self._report_to is not None:
                self._report_to(now)
        finally:
            self._reporting.release()

    def _now(self) -> Progress:
        at = self._clock()
        since, transferred = self._last
        counters = self.counters()
        if at > since:
            self._rate = (counters.transferred - transferred) / (at - since)
        self._last = (at, counters.transferred)
        return Progress(
            self._phase,
            transferred=counters.transferred,
            ram_total=self._ram_total,
            page_size=self._page_size,
            normal_pages=counters.normal,
            zero_pages=counters.zero,
            round=self._round,
            rate=self._rate,
            elapsed=0.0 if self._started is None else at - self._started,
        )
