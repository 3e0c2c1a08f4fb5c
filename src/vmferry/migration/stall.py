"""A migration that makes no progress: how that is seen, and what would help.

What remains after each round falls while a migration converges, and goes up and down around some
level when it does not.  A round with less than ever before says little, and one with more says
nothing: machines work in phases.  So progress is a round that leaves clearly less than the best so
far, and a stall is a number of rounds and of seconds without progress.  While what remains is
falling from one round to the next, as it does behind a burst of writes, nothing is said: that ends
in progress, or near a minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from vmferry.units import format_duration, format_rate, format_size

from .parameters import Parameters

MARGIN: Final = 0.04
"""How much less is clearly less."""


@dataclass(frozen=True, slots=True)
class Stall:
    """A migration makes no progress.

    For ``rounds`` rounds, which took ``seconds``, never less than ``remaining`` bytes were left.
    ``dirty_rate`` and ``bandwidth`` are in bytes per second, ``downtime_limit`` in milliseconds.
    ``limit_needed``, in milliseconds, is the downtime limit that would do at this bandwidth, and
    ``bandwidth_needed``, in bytes per second, the bandwidth that would do within this limit;
    ``None`` where that is not known.  ``advice`` is all that would help, in words.
    """

    rounds: int
    seconds: float
    remaining: int
    dirty_rate: float
    bandwidth: float
    downtime_limit: int
    limit_needed: int | None = None
    bandwidth_needed: float | None = None
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"no progress for {self.rounds} rounds ({format_duration(self.seconds)}):"
            f" {format_size(self.remaining)} or more remain, {format_rate(self.dirty_rate)} are"
            f" written and {format_rate(self.bandwidth)} sent, with a downtime limit of"
            f" {format_duration(self.downtime_limit / 1000)}"
        )
        return f"{text}; {'; or '.join(self.advice)}" if self.advice else text


class StallWatch:
    """Watches what remains after each round."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew: nothing of what was seen counts any more."""
        self._best = self._lowest = self._previous = math.inf
        self._start()

    def go_on(self) -> None:
        """A stall was acted on: from here on the best of it is what has to be bettered."""
        self._best, self._lowest = self._lowest, math.inf
        self._start()

    def _start(self) -> None:
        self.rounds = 0
        """Rounds without progress."""
        self.seconds = 0.0
        """What they took."""

    @property
    def lowest(self) -> int:
        """The least that remained since progress ended; only where there was a round."""
        return int(self._lowest)

    def is_stalled(self, remaining: int, seconds: float, parameters: Parameters) -> bool:
        """A round of so many seconds left *remaining* bytes: whether that is a stall by now."""
        is_falling = _is_clearly_less(remaining, self._previous)
        self._previous = remaining
        if _is_clearly_less(remaining, self._best):
            self._best = self._lowest = remaining
            self._start()
            return False
        self._lowest = min(self._lowest, remaining)
        self.rounds += 1
        self.seconds += seconds
        return (
            self.rounds >= parameters.stall_rounds
            and self.seconds >= parameters.stall_seconds
            and not is_falling
        )


def _is_clearly_less(number: float, than: float) -> bool:
    return number < than * (1 - MARGIN)
