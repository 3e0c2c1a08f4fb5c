"""What happens to a migration, for a user to iterate over, and the QMP events that some of it is.

QEMU 7.2 ``qapi/run-state.json``: ``STOP`` and ``RESUME``; ``qapi/migration.json``: ``MIGRATION``
and ``MIGRATION_PASS``, both only with capability ``events``.  ``VMFERRY_STALLED`` and
``VMFERRY_WARNING`` are not QEMU's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

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


@dataclass(frozen=True, slots=True)
class Warned:
    """Something went wrong, and the migration goes on, or is not changed by it any more."""

    message: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The machine was stopped, so that the rest of it can be sent."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The machine runs: here again, or here for the first time."""


Event = (
    StatusChanged
    | Pass
    | Progress
    | Throttled
    | DowntimeRaised
    | Stalled
    | Warned
    | Stopped
    | Resumed
)
"""Everything that happens; progress every tenth of a second or so, that of a source as
:class:`~vmferry.migration.statistics.LiveProgress`."""


WARNING: Final = "VMFERRY_WARNING"

OPTIONAL: Final = frozenset({"MIGRATION", "MIGRATION_PASS"})
"""The QMP events that are for capability ``events`` only."""


def to_qmp(event: Event) -> tuple[str, dict[str, object]] | None:
    """The name and the data of the QMP event that *event* is; ``None`` where QEMU has none."""
    told: tuple[str, dict[str, object]] | None = None
    match event:
        case StatusChanged(status):
            told = "MIGRATION", {"status": str(status)}
        case Pass(number):
            told = "MIGRATION_PASS", {"pass": number}
        case Stopped():
            told = "STOP", {}
        case Resumed():
            told = "RESUME", {}
        case Stalled(report):
            told = "VMFERRY_STALLED", {"message": str(report)}
        case Warned(message):
            told = WARNING, {"message": message}
    return told
