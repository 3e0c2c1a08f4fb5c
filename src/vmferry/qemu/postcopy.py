"""When a migration that somebody else carries out is to go on as postcopy."""

from __future__ import annotations

import time
from typing import Final, Protocol

from vmferry.migration.parameters import Parameters
from vmferry.migration.stall import StallWatch

from .info import MigrationInfo

CAPABILITY: Final = "postcopy-ram"


def postcopy(*, preempt: bool) -> list[str]:
    """The capabilities of a side whose memory follows."""
    return [CAPABILITY, *(["postcopy-preempt"] if preempt else [])]


class When(Protocol):
    """When to switch."""

    def is_due(self, now: MigrationInfo) -> bool:
        """Whether it is time, as of this look at a migration in precopy; asked at each."""


class AfterRounds:
    """Once so many passes over memory have ended; 0: as soon as it is under way."""

    def __init__(self, rounds: int = 0) -> None:
        self._rounds = rounds

    def is_due(self, now: MigrationInfo) -> bool:
        """See :class:`When`."""
        return now.round > self._rounds


class AtStall:
    """Where it makes no progress, by the measure of a machine of vmferry and its defaults."""

    def __init__(self) -> None:
        self._watch = StallWatch()
        self._parameters = Parameters()
        self._round = 0
        self._since = time.monotonic()

    def is_due(self, now: MigrationInfo) -> bool:
        """See :class:`When`."""
        if now.round == self._round:
            return False
        at = time.monotonic()
        seconds, self._since = at - self._since, at
        is_first, self._round = self._round == 0, now.round
        return not is_first and self._watch.is_stalled(now.remaining, seconds, self._parameters)
