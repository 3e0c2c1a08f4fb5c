"""When to stop the machine and send the rest, and what to do while there is too much of it.

QEMU 7.2 ``migration_update_counters`` and ``migration_iteration_run`` in ``migration/migration.c``:
what remains may be sent with the machine stopped when that fits the downtime limit at the bandwidth
there is.  Beyond QEMU, a migration that makes no progress says so (:mod:`~vmferry.migration.stall`)
and does what the stall policy says:

* *keep-trying* reports it once, and again when things have changed.
* *raise-downtime* raises the limit by as many steps as it takes for the best round of the stall to
  fit, at least by one, and at most to the ceiling.  The switchover comes when so little remains
  again: near a minimum, whatever the machine does in between.
* *throttle* slows the machine down by one step more.
* *postcopy* lets the machine go before its memory, where the capability is on.
* *give-up* gives up, and so do those before that have no step left, or no capability.

All but the first end: there are so many steps, and a stall follows the other after so many rounds.
A change of parameters and a step of auto-converge begin the observation anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from .advice import with_advice
from .capabilities import Capability
from .parameters import Parameters, StallPolicy
from .rates import Bandwidth, Period, Periods
from .stall import MARGIN, Stall, StallWatch
from .throttling import Throttling

_NEWS: Final = 1.5
"""By what factor the limit needed has to change for a stall to be worth another report."""


@dataclass(frozen=True, slots=True)
class Round:
    """A round that ended with a collection of the dirty log.

    ``sent`` bytes on the wire in ``seconds`` since the collection before; ``dirtied`` bytes of
    guest memory were found in this one, and ``remaining`` are to be sent now.  A round sends all
    that there is, so that the two are the same: if it left as much as may remain in a switchover,
    what was written meanwhile would come on top of that, every time.
    """

    sent: int
    seconds: float
    remaining: int
    dirtied: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do at the end of a round; with nothing set: go on.

    ``postcopy``: switch to it.  ``switch_over``: stop the machine and send the rest.  ``give_up``:
    fail, with ``stall`` as the reason.  ``throttle``: the percentage of time for which to keep the
    machine from running from now on.  ``downtime_limit``: the limit in milliseconds was raised to
    this.  ``stall``: report it.
    """

    switch_over: bool = False
    postcopy: bool = False
    give_up: bool = False
    throttle: int | None = None
    downtime_limit: int | None = None
    stall: Stall | None = None


class Convergence:
    """Decides for one migration.  Knows neither clock nor thread: it is told what happened.

    *device_bytes* is what the state of the devices takes on the wire, and *overhead* the seconds of
    downtime that do not depend on the bandwidth: stopping here, loading and starting there.
    """

    def __init__(self, *, device_bytes: int = 0, overhead: float = 0.0) -> None:
        self._device_bytes = device_bytes
        self._overhead = overhead
        self._bandwidth = Bandwidth()
        self._periods = Periods()
        self._throttling = Throttling()
        self._watch = StallWatch()
        self._raised: int | None = None
        self._reported: Stall | None = None
        self._parameters: Parameters | None = None

    def sample(self, sent: int, seconds: float) -> None:
        """So many bytes went in so many seconds: a tenth of one or more, at any time."""
        self._bandwidth.add(sent, seconds)

    def round_ended(
        self, ended: Round, parameters: Parameters, capabilities: frozenset[Capability]
    ) -> Decision:
        """What to do now."""
        if not self._bandwidth.is_known:
            self.sample(ended.sent, ended.seconds)
        period = self._periods.add(ended.sent, ended.dirtied, ended.seconds)
        self._notice(parameters)
        if self.fits(ended.remaining, parameters):
            return Decision(switch_over=True)
        if period is not None and Capability.AUTO_CONVERGE in capabilities:
            percentage = self._throttling.judge(period, parameters)
            if percentage is not None:
                self._begin_anew()
                return Decision(throttle=percentage)
        if not self._watch.is_stalled(ended.remaining, ended.seconds, parameters):
            return Decision()
        stall = self._stall(parameters, capabilities)
        decision = self._act(ended, stall, parameters, capabilities)
        self._watch.go_on()
        return decision

    # What is known

    @property
    def throttle(self) -> int:
        """The percentage of time for which the machine is kept from running."""
        return self._throttling.percentage

    @property
    def dirty_rate(self) -> float:
        """Bytes per second that the machine writes to."""
        return self._periods.dirty_rate

    def bandwidth(self, parameters: Parameters) -> float:
        """Bytes per second to count on in the switchover; 0.0 as long as nothing is known."""
        return float(parameters.avail_switchover_bandwidth) or self._bandwidth.value

    def downtime_limit(self, parameters: Parameters) -> int:
        """The limit that holds, in milliseconds: the parameter, or what it was raised to."""
        return max(parameters.downtime_limit, self._raised or 0)

    def expected_downtime(self, remaining: int, parameters: Parameters) -> float | None:
        """Seconds that a switchover with so many bytes left would take; ``None``: not known."""
        bandwidth = self.bandwidth(parameters)
        if not bandwidth:
            return None
        return (remaining + self._device_bytes) / bandwidth + self._overhead

    def threshold(self, parameters: Parameters) -> int:
        """Bytes that may remain for a switchover."""
        seconds = self.downtime_limit(parameters) / 1000 - self._overhead
        return max(int(self.bandwidth(parameters) * seconds) - self._device_bytes, 0)

    def fits(self, remaining: int, parameters: Parameters) -> bool:
        """Whether so many bytes can be sent within the downtime limit; nothing always can."""
        return remaining <= self.threshold(parameters)

    # What to do about a stall

    def _act(
        self,
        ended: Round,
        stall: Stall,
        parameters: Parameters,
        capabilities: frozenset[Capability],
    ) -> Decision:
        match parameters.stall_policy:
            case StallPolicy.KEEP_TRYING:
                return Decision(stall=self._news(stall))
            case StallPolicy.RAISE_DOWNTIME if limit := self._raise(stall, parameters):
                fits = self.fits(ended.remaining, parameters)
                return Decision(switch_over=fits, downtime_limit=limit, stall=stall)
            case StallPolicy.THROTTLE:
                period = Period(ended.sent, ended.dirtied, ended.seconds)
                if percentage := self._throttling.step(period, parameters):
                    return Decision(throttle=percentage, stall=stall)
            case StallPolicy.POSTCOPY if Capability.POSTCOPY_RAM in capabilities:
                return Decision(postcopy=True, stall=stall)
        return Decision(give_up=True, stall=stall)

    def _raise(self, stall: Stall, parameters: Parameters) -> int | None:
        """Raise the limit to what the best round of the stall needs, or as far as may be."""
        limit, step = self.downtime_limit(parameters), parameters.downtime_step
        needed = stall.limit_needed or 0
        steps = max(math.ceil((needed - limit) / step), 1)
        raised = min(limit + steps * step, parameters.downtime_ceiling)
        if raised <= limit:
            return None
        self._raised = raised
        return raised

    def _news(self, stall: Stall) -> Stall | None:
        if self._reported is not None and not _differ(self._reported, stall):
            return None
        self._reported = stall
        return stall

    def _notice(self, parameters: Parameters) -> None:
        before, self._parameters = self._parameters, parameters
        if before is None or before == parameters:
            return
        if before.downtime_limit != parameters.downtime_limit:
            self._raised = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._watch.forget()
        self._reported = None

    def _stall(self, parameters: Parameters, capabilities: frozenset[Capability]) -> Stall:
        watch = self._watch
        near = int(watch.lowest * (1 + MARGIN))
        expected = self.expected_downtime(near, parameters)
        seconds = self.downtime_limit(parameters) / 1000 - self._overhead
        stall = Stall(
            rounds=watch.rounds,
            seconds=watch.seconds,
            remaining=watch.lowest,
            dirty_rate=self.dirty_rate,
            bandwidth=self.bandwidth(parameters),
            downtime_limit=self.downtime_limit(parameters),
            limit_needed=None if expected is None else math.ceil(expected * 1000),
            bandwidth_needed=(near + self._device_bytes) / seconds if seconds > 0 else None,
        )
        return with_advice(stall, parameters, capabilities)


def _differ(one: Stall, other: Stall) -> bool:
    before, after = one.limit_needed or 0, other.limit_needed or 0
    return max(before, after) >= _NEWS * max(min(before, after), 1)
