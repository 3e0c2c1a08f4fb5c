"""What a monitor says of a migration: the answer to ``query-migrate``, in bytes and seconds.

The keys and their units are those of MigrationInfo in QEMU's ``qapi/migration.json``.  A monitor is
another program: what is missing or not a number counts as 0 or as unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

ENDED: Final = frozenset({"completed", "sent", "failed", "cancelled"})
"""The statuses after which nothing more happens; ``sent`` is what a machine of vmferry says where
a QEMU says ``completed`` without having been told so."""


@dataclass(frozen=True, slots=True)
class MigrationInfo:
    """A moment of a migration, as one side of it sees it.

    ``status`` is QEMU's word, ``none`` where there was no migration yet.  Sizes are in bytes, rates
    in bytes per second, times in seconds.  ``round`` counts passes over memory from 1.
    ``remaining`` is what is known to be unsent, ``dirty_rate`` what the machine writes to,
    ``throttle`` how much it is slowed down, in percent.  ``requests`` counts pages that the machine
    has asked for from the other side, in postcopy, and ``service_time`` is how long a machine of
    vmferry takes to send one, the median.  ``stall`` is why it makes no progress,
    where a machine of vmferry says so; ``error`` is empty unless it failed with a reason;
    ``confirmed`` says whether a source that has completed was told so by the destination.  ``None``
    is what the machine does not tell, or not yet.
    """

    status: str = "none"
    transferred: int = 0
    remaining: int = 0
    total: int = 0
    round: int = 0
    rate: float = 0.0
    dirty_rate: float = 0.0
    total_time: float = 0.0
    setup_time: float | None = None
    expected_downtime: float | None = None
    downtime: float | None = None
    throttle: int | None = None
    requests: int = 0
    service_time: float | None = None
    stall: str = ""
    error: str = ""
    confirmed: bool | None = None

    @classmethod
    def from_qmp(cls, answer: Mapping[str, Any]) -> MigrationInfo:
        """What the *answer* to ``query-migrate`` says."""
        ram, disk = _part(answer, "ram"), _part(answer, "disk")
        throttle = _number(answer, "cpu-throttle-percentage")
        return cls(
            status=str(answer.get("status", "none")),
            transferred=_count(ram, "transferred") + _count(disk, "transferred"),
            remaining=_count(ram, "remaining") + _count(disk, "remaining"),
            total=_count(ram, "total") + _count(disk, "total"),
            round=_count(ram, "dirty-sync-count"),
            rate=(_number(ram, "mbps") or 0.0) * 1e6 / 8,
            dirty_rate=float(_count(ram, "dirty-pages-rate") * _count(ram, "page-size")),
            total_time=_seconds(answer, "total-time") or 0.0,
            setup_time=_seconds(answer, "setup-time"),
            expected_downtime=_seconds(answer, "expected-downtime"),
            downtime=_seconds(answer, "downtime"),
            requests=_count(ram, "postcopy-requests"),
            service_time=_scaled(answer, "x-vmferry-service-us", 1e6),
            throttle=None if throttle is None else int(throttle),
            stall=str(answer.get("x-vmferry-stall", "")),
            error=str(answer.get("error-desc", "")),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``, under the same names; rates in whole bytes a second."""
        return asdict(self) | {"rate": round(self.rate), "dirty_rate": round(self.dirty_rate)}

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens."""
        return self.status in ENDED

    @property
    def is_under_way(self) -> bool:
        """Whether it began and has not ended."""
        return self.status != "none" and not self.has_ended

    @property
    def is_postcopy(self) -> bool:
        """Whether the machine already runs on the other side, so that there is no way back."""
        return self.status.startswith("postcopy")


def _part(answer: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = answer.get(key)
    return part if isinstance(part, Mapping) else {}


def _number(answer: Mapping[str, Any], key: str) -> float | None:
    """A number that can be reckoned with."""
    value = answer.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < math.inf else None


def _count(answer: Mapping[str, Any], key: str) -> int:
    return int(_number(answer, key) or 0)


def _seconds(answer: Mapping[str, Any], key: str) -> float | None:
    return _scaled(answer, key, 1000)


def _scaled(answer: Mapping[str, Any], key: str, units: float) -> float | None:
    """So many *units* as seconds."""
    value = _number(answer, key)
    return None if value is None else value / units
