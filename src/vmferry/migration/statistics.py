"""What a migration has done so far, as ``query-migrate`` tells it.

QEMU 7.2 ``fill_source_migration_info`` in ``migration/migration.c``, and ``qapi/migration.json``
for names and units.  What there cannot be here (zero-copy, skipped pages) is 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from .capabilities import Capability
from .disks import LiveDisks
from .parameters import Parameters
from .postcopy.server import Service
from .progress import INTERVAL, Counters, Meter, Progress, Report
from .status import UNDER_WAY, Status

Info = dict[str, Any]

_LATEST: Final = 1000
"""Answers to requests that are looked at to say how fast they are."""

_DONE: Final = frozenset({Status.COMPLETED, Status.SENT})


@dataclass(frozen=True, slots=True)
class Sample:
    """What moved in some time: ``sent`` bytes in ``seconds``."""

    sent: int
    seconds: float


@dataclass(frozen=True, slots=True)
class LiveProgress(Progress):
    """A moment of the migration of a running machine, whose status is ``phase``.

    ``remaining`` bytes of this round, ``dirty_rate`` in bytes per second, ``expected_downtime`` in
    seconds where it is known, and ``throttle``, the percentage of time for which the machine is
    kept from running.
    """

    remaining: int = 0
    dirty_rate: float = 0.0
    expected_downtime: float | None = None
    throttle: int = 0


class Statistics(Meter):
    """The counters of one migration of a running machine, and its moments in time.

    It begins when it is made.  Any thread may count and ask; the moments, and what was found out
    about guest memory, are told by the one that leads the migration.
    """

    def __init__(
        self, report: Report | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(report, clock=clock)
        self._began = clock()
        self._set_up: float | None = None
        self._stopped: float | None = None
        self._finished: float | None = None
        self._runs_there: float | None = None
        self._before_postcopy: int | None = None
        self.service = Service()
        """What was asked for in postcopy."""
        self.disks: LiveDisks | None = None
        """The disks that move along."""
        self._remaining = 0
        self._dirty_rate = 0.0
        self._expected: float | None = None
        self._throttle = 0
        self._before_stop = 0
        self._miss_rate = self._encoding_rate = 0.0
        self._at_sync = Counters()
        self._sampled = (self._began, Counters())
        self._bandwidth = 0.0
        self._pages_per_second = 0

    # Moments

    def active(self, ram_total: int, page_size: int) -> None:
        """Setup is over: guest memory is known, and begins to move."""
        self._set_up = self._clock()
        self._sampled = (self._set_up, self.counters())
        super().active(ram_total, page_size)

    def synced(self, remaining: int) -> None:
        """The dirty log was collected, and so many bytes are to be sent now; a round begins."""
        self._update_xbzrle(self.counters())
        self.remains(remaining)
        self.next_round()

    def remains(self, remaining: int) -> None:
        """So many bytes are to be sent from now on."""
        self._remaining, self._at_sync = remaining, self.counters()

    def expect(self, *, dirty_rate: float, downtime: float | None, throttle: int) -> None:
        """What is expected: bytes written a second, seconds of downtime, percent of throttling."""
        self._dirty_rate, self._expected, self._throttle = dirty_rate, downtime, throttle

    def stopped(self) -> None:
        """The machine was stopped for the switchover: the downtime begins."""
        self._before_stop = self.counters().ram
        self._stopped = self._clock()

    def switched(self) -> None:
        """From here on memory follows the machine."""
        self._before_postcopy = self.counters().ram

    def runs_there(self) -> None:
        """The destination runs the machine, and its memory follows: the downtime is over."""
        self._runs_there = self._clock()

    def finished(self) -> None:
        """The destination runs the machine: downtime and total time are over."""
        self._finished = self._clock()
        self._remaining, self._at_sync, self._dirty_rate = 0, self.counters(), 0.0
        spent = self._finished - (self._set_up or self._began)
        self._bandwidth = self._at_sync.transferred / spent if spent else 0.0

    def sample(self) -> Sample | None:
        """What moved since the sample before; ``None`` within a tenth of a second of that.

        As QEMU does it, ``mbps`` and ``pages-per-second`` are those of the last such interval.
        """
        at, now = self._clock(), self.counters()
        since, before = self._sampled
        seconds = at - since
        if seconds < INTERVAL:
            return None
        self._sampled = (at, now)
        sample = Sample(now.transferred - before.transferred, seconds)
        self._bandwidth = sample.sent / seconds
        self._pages_per_second = int((now.pages - before.pages) / seconds)
        return sample

    # Questions

    @property
    def remaining(self) -> int:
        """Bytes of guest memory that are still to be sent in this round."""
        sent = self.counters().pages - self._at_sync.pages
        return max(self._remaining - sent * self._page_size, 0)

    @property
    def downtime(self) -> float:
        """Seconds for which the machine stands still, or stood still; 0.0 before that."""
        if self._stopped is None:
            return 0.0
        moments = (self._runs_there, self._finished, self._clock())
        return next(moment for moment in moments if moment is not None) - self._stopped

    def query(
        self,
        status: Status,
        *,
        capabilities: frozenset[Capability] = frozenset(),
        parameters: Parameters | None = None,
        error: str | None = None,
    ) -> Info:
        """The source's answer to ``query-migrate``; *error* says why a migration failed."""
        if status is Status.NONE:
            return {}
        info: Info = {"status": str(status)}
        if status is Status.FAILED and error is not None:
            info["error-desc"] = error
        if status is Status.SETUP or status not in UNDER_WAY | _DONE:
            return info
        parameters = parameters or Parameters()
        info |= self._times(status, parameters) | {"ram": self._ram()}
        if self.disks is not None:
            info["disk"] = self._disk(self.disks)
        if Capability.XBZRLE in capabilities:
            info["xbzrle-cache"] = self._xbzrle(parameters)
        if took := self.service.took[-_LATEST:]:
            info["x-vmferry-service-us"] = round(float(np.median(took)) * 1e6)
        if self._throttle:
            info["cpu-throttle-percentage"] = self._throttle
        return info

    def _times(self, status: Status, parameters: Parameters) -> Info:
        until = self._clock() if self._finished is None else self._finished
        setup = 0.0 if self._set_up is None else self._set_up - self._began
        times = {
            "total-time": _milliseconds(until - self._began),
            "setup-time": _milliseconds(setup),
        }
        if status in _DONE or self._runs_there is not None:
            return times | {"downtime": _milliseconds(self.downtime)}
        # Until something is known it is what was asked for.
        expected = self._expected
        limit = parameters.downtime_limit
        return times | {"expected-downtime": limit if expected is None else _milliseconds(expected)}

    def _ram(self) -> Info:
        counters = self.counters()
        stopped = self._stopped is not None
        precopy = self._before_stop if stopped else counters.ram
        before = self._before_postcopy
        postcopy = 0 if before is None else counters.ram - before
        return {
            "transferred": counters.ram,
            "remaining": self.remaining,
            "total": self._ram_total,
            "duplicate": counters.zero,
            "skipped": 0,
            "normal": counters.normal,
            "normal-bytes": counters.normal * self._page_size,
            "dirty-pages-rate": int(self._dirty_rate / self._page_size) if self._page_size else 0,
            "mbps": self._bandwidth * 8 / 1e6,
            "dirty-sync-count": self._round,
            "page-size": self._page_size,
            "multifd-bytes": counters.multifd,
            "pages-per-second": self._pages_per_second,
            "postcopy-requests": self.service.requests,
            "precopy-bytes": precopy,
            "downtime-bytes": counters.ram - precopy - postcopy,
            "postcopy-bytes": postcopy,
            "dirty-sync-missed-zero-copy": 0,
        }

    def _disk(self, disks: LiveDisks) -> Info:
        """A ``MigrationStats`` of QEMU, in which for disks only these are not 0."""
        numbers = dict.fromkeys(self._ram(), 0)
        return numbers | {
            "transferred": disks.done,
            "remaining": 0 if self._finished else disks.remaining,
            "total": disks.total,
        }

    def _xbzrle(self, parameters: Parameters) -> Info:
        counters = self.counters()
        return {
            "cache-size": parameters.xbzrle_cache_size,
            "bytes": counters.xbzrle_bytes,
            "pages": counters.xbzrle_pages,
            "cache-miss": counters.xbzrle_misses,
            "cache-miss-rate": self._miss_rate,
            "encoding-rate": self._encoding_rate,
            "overflow": counters.xbzrle_overflows,
        }

    def _update_xbzrle(self, now: Counters) -> None:
        """The rates of the round that ends: misses per page, and bytes of pages per byte sent."""
        before = self._at_sync
        if pages := now.pages - before.pages:
            self._miss_rate = (now.xbzrle_misses - before.xbzrle_misses) / pages
            encoded = (now.xbzrle_pages - before.xbzrle_pages) * self._page_size
            self._encoding_rate = encoded / max(now.xbzrle_bytes - before.xbzrle_bytes, 1)

    def _now(self) -> LiveProgress:
        return LiveProgress(
            **asdict(super()._now()),
            remaining=self.remaining + (self.disks.remaining if self.disks is not None else 0),
            dirty_rate=self._dirty_rate,
            expected_downtime=self._expected,
            throttle=self._throttle,
        )


def query_incoming(
    status: Status,
    addresses: Sequence[Mapping[str, object]] = (),
    *,
    waits: tuple[Sequence[float], float] | None = None,
) -> Info:
    """The destination's answer to ``query-migrate``; *addresses* where it listens, while it does.

    An address is one of QEMU's ``SocketAddress``, as ``{"type": "unix", "path": ...}``.  *waits*:
    seconds that each processor waited for memory, and all at once; told in the end.
    """
    info: Info = {} if status is Status.NONE else {"status": str(status)}
    if waits is not None and status is Status.COMPLETED:
        each, together = waits
        info["postcopy-blocktime"] = _milliseconds(together)
        info["postcopy-vcpu-blocktime"] = [_milliseconds(seconds) for seconds in each]
    if addresses:
        info["socket-address"] = [dict(address) for address in addresses]
    return info


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
