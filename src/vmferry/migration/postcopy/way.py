"""How the source of a postcopy migration reaches its destination."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vmferry.transports import Channel
from vmferry.wire.commands import RamDiscard

from .server import RamFormat


@dataclass(frozen=True, slots=True)
class Way:
    """How to reach the destination; *idle* and *answer* as a source has them, in seconds.

    ``heeds`` is whether it runs the machine at *go* and not before.
    """

    main: Channel
    urgent: Channel | None
    idle: float | None
    answer: float | None
    heeds: bool


class Follower(Protocol):
    """Who goes on where a source switches to postcopy."""

    def discards_ahead(self) -> Sequence[RamDiscard]:
        """What the destination may forget while the machine still runs here, and was not told yet.

        Asked for more than once.
        """

    def follow(self, way: Way, ram: RamFormat) -> None:
        """Stop the machine, give it away, and send its memory."""
