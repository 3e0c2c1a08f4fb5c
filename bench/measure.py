"""Samples taken in turn, and the rows that are made of them.

Cases that are compared run one after the other in every round, so that whatever else the machine
does meets all of them alike; a ratio is taken within each round.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Unmeasured(Exception):
    """Why something could not be measured."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure must be: *bound* or more, or with *most* the bound or less."""

    bound: float
    most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """A figure: *values* has one number for each round, or *error* says why there is none.

    *name* is the same in every run; *what* is for people.
    """

    name: str
    what: str
    unit: str
    values: Sequence[float] = ()
    target: Target | None = None
    error: str = ""

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met by the median; ``None`` without target or figure."""
        if self.target is None or self.median is None:
            return None
        return self.target.is_met(self.median)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "median": self.median,
            "lowest": min(self.values, default=None),
            "highest": max(self.values, default=None),
            "values": list(self.values),
            "target": str(self.target) if self.target else None,
            "met": self.is_met,
            "error": self.error or None,
        }


Sample = Mapping[str, float]
"""What one run of a case gave, by the name of the quantity."""

Cases = Mapping[str, Callable[[], Sample]]


class Samples:
    """What every case gave in every round."""

    def __init__(
        self, cases: Cases, rounds: int, *, before: Callable[[], object] | None = None
    ) -> None:
        """Run *cases* in turn, *rounds* times, after one round that does not count.

        *before* is called before each.  A case that fails is not tried again, and its rows say why.
        """
        self._taken: dict[str, list[Sample]] = {name: [] for name in cases}
        self._errors: dict[str, str] = {}
        for number in range(rounds + 1):
            for name, run in cases.items():
                if name in self._errors:
                    continue
                show(f"{name}, round {number} of {rounds}")
                if before is not None:
                    before()
                try:
                    sample = run()
                except Exception as error:  # noqa: BLE001 - it stands in the table
                    self._errors[name] = f"{type(error).__name__}: {error}"
                    continue
                if number:
                    self._taken[name].append(sample)
        show("")

    def row(
        self,
        name: str,
        what: str,
        unit: str,
        case: str,
        figure: Callable[[Sample], float],
        target: Target | None = None,
    ) -> Row:
        """*figure* of each sample of *case*."""
        if error := self._errors.get(case):
            return Row(name, what, unit, target=target, error=error)
        values = [figure(sample) for sample in self._taken[case]]
        return Row(name, what, unit, values, target)

    def values(self, case: str, figure: Callable[[Sample], float]) -> list[float]:
        """*figure* of each sample of *case*; none where it failed."""
        return [figure(sample) for sample in self._taken[case]]

    def ratio(
        self,
        name: str,
        what: str,
        case: str,
        other: str,
        figure: Callable[[Sample], float],
        target: Target | None = None,
    ) -> Row:
        """How many times the *figure* of *other* that of *case* is, round by round."""
        for one in (case, other):
            if error := self._errors.get(one):
                return Row(name, what, "x", target=target, error=f"{one}: {error}")
        pairs = zip(self._taken[case], self._taken[other], strict=True)
        return Row(name, what, "x", [figure(a) / figure(b) for a, b in pairs], target)


def show(text: str) -> None:
    """What is going on, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def rate(sample: Sample) -> float:
    """GB/s of a sample with ``bytes`` and ``seconds``."""
    return sample["bytes"] / sample["seconds"] / 1e9


def pace(sample: Sample) -> float:
    """Runs per second: what to compare where bytes differ but the work is the same."""
    return 1 / sample["seconds"]


def milliseconds(quantity: str) -> Callable[[Sample], float]:
    """A quantity in seconds, as milliseconds."""
    return lambda sample: sample[quantity] * 1e3


def quantity(name: str) -> Callable[[Sample], float]:
    """A quantity as it is."""
    return lambda sample: sample[name]
