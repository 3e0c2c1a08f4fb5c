"""How the source of a postcopy migration reaches its destination."""

from __future__ import annotations

from dataclasses import dataclass

from vmferry.transports import Channel


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
