"""Machines that write to their memory, and the migration of one, in numbers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vmferry.migration.capabilities import Capability
from vmferry.migration.convergence import Convergence, Decision, Round
from vmferry.migration.parameters import Parameters

MIB = 1 << 20
GIB = 1 << 30
WINDOW = 0.1

Writes = Callable[[float, float], float]
"""Bytes of different pages that a machine writes to from one moment to another, at full speed."""


def steady(rate: float, working_set: float = GIB) -> Writes:
    """Walks over its working set at a constant rate."""
    return lambda since, until: min(rate * (until - since), working_set)


def growing(rate: float, each_second: float, working_set: float = GIB) -> Writes:
    """Writes faster and faster."""
    return lambda since, until: min(
        (rate + each_second * (since + until) / 2) * (until - since), working_set
    )


def bursts(calm: Writes, wild: Writes, *, every: float, lasting: float) -> Writes:
    """Calm, but for a burst at the end of each *every* seconds."""

    def writes(since: float, until: float) -> float:
        is_wild = until % every > every - lasting
        return (wild if is_wild else calm)(since, until)

    return writes


def levels(*remaining: float) -> Iterator[float]:
    """What remains after each round, over and over."""
    while True:
        yield from remaining


@dataclass(slots=True)
class Outcome:
    """How a migration went: the decision that ended it, if one did, and all those before."""

    decisions: list[Decision]
    remaining: list[int]
    limit: int
    seconds: float
    downtime: float
    stalls: list[int] = field(default_factory=list)
    """The rounds, counted from 1, in which a stall was reported."""

    @property
    def switched_over(self) -> bool:
        return self.decisions[-1].switch_over

    @property
    def gave_up(self) -> bool:
        return self.decisions[-1].give_up

    @property
    def rounds(self) -> int:
        return len(self.decisions)


def migrate(
    writes: Writes | Iterator[float],
    *,
    parameters: Parameters | Callable[[int], Parameters],
    capabilities: frozenset[Capability] = frozenset(),
    bandwidth: float = 100 * MIB,
    memory: int = GIB,
    rounds: int = 500,
) -> Outcome:
    """The migration of a machine with *memory*, until it ends or *rounds* are over.

    *parameters* may change with the number of the round.
    """
    convergence = Convergence()
    remaining, now = memory, 0.0
    decisions: list[Decision] = []
    left: list[int] = []
    while True:
        current = parameters(len(decisions) + 1) if callable(parameters) else parameters
        sent = remaining
        seconds = max(sent / bandwidth, 0.001)
        for _ in range(min(int(seconds / WINDOW), 10)):
            convergence.sample(int(bandwidth * WINDOW), WINDOW)
        speed = 1 - convergence.throttle / 100
        if callable(writes):
            dirtied = int(min(writes(now, now + seconds) * speed, memory))
        else:
            dirtied = int(next(writes))
        now += seconds
        remaining = dirtied
        ended = Round(sent, seconds, remaining, dirtied)
        decisions.append(convergence.round_ended(ended, current, capabilities))
        left.append(remaining)
        last = decisions[-1]
        if last.switch_over or last.give_up or len(decisions) == rounds:
            return Outcome(
                decisions,
                left,
                limit=convergence.downtime_limit(current),
                seconds=now,
                downtime=remaining / bandwidth,
                stalls=[n for n, one in enumerate(decisions, 1) if one.stall is not None],
            )
