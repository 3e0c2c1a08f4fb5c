"""What happens to a migration, for a user to iterate over, and the QMP events that some of it is.

QEMU 7.2 ``qapi/migration.json``: ``MIGRATION`` and ``MIGRATION_PASS``, both only with capability
``events``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .progress import Progress
from .stall import Stall
from .status import Status


@dataclass(frozen=True, slots=True)
class StatusChanged:
    """The migration has a new status."""

    status: Status


@dataclass(frozen=True, slots=True)
class Pass:
    """Pass ``number`` over guest memory begins, counted from 1, with so many bytes to send."""

    number: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Throttled:
    """The machine is kept from running for so many percent of the time, from now on."""

    percentage: int


@dataclass(frozen=True, slots=True)
class DowntimeRaised:
    """The machine may stand still for so many milliseconds, so that the migration can end."""

    limit: int


@dataclass(frozen=True, slots=True)
class Stalled:
    """The migration makes no progress."""

    report: Stall


Event = StatusChanged | Pass | Progress | Throttled | DowntimeRaised | Stalled
"""Everything that happens; progress every tenth of a second or so, that of a source as
:class:`~vmferry.migration.statistics.LiveProgress`."""


def to_qmp(event: Event) -> tuple[str, dict[str, object]] | None:
    """The name and the data of the QMP event that *event* is; ``None`` where QEMU has none."""
    match event:
        case StatusChanged(status):
            return "MIGRATION", {"status": str(status)}
        case Pass(number):
            return "MIGRATION_PASS", {"pass": number}
        case _:
            return None
