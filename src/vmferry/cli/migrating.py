"""A migration that another process carries out, in words: for ``migrate`` and ``status``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from vmferry.qemu import MachineStatus, MigrationInfo
from vmferry.units import format_duration, format_rate, format_size

from .output import count, name, one_line


class Migrating:
    """Progress of such a migration."""

    first: Final = MigrationInfo()

    def is_shown(self, now: MigrationInfo) -> bool:
        """As long as it is under way."""
        return now.is_under_way

    def phase(self, now: MigrationInfo) -> str:
        """QEMU's word."""
        return name(now.status)

    def share(self, now: MigrationInfo) -> float:
        """How much of memory is not known to be unsent."""
        return max(0.0, 1.0 - now.remaining / now.total) if now.total else 0.0

    def rows(self, now: MigrationInfo) -> list[list[str]]:
        """How fast it is, and how it converges; nothing before its memory is known."""
        if not now.total:
            return [["waits for migrate-continue"] if now.status == "pre-switchover" else []]
        first = [
            format_rate(now.rate),
            f"{format_size(now.remaining)} of {format_size(now.total)} left",
        ]
        if now.is_postcopy:
            asked = ["runs on the other side", count(now.requests, "page") + " asked for"]
            if now.service_time is not None:
                asked.append(f"each sent within {format_duration(now.service_time)}")
            return [first, asked]
        second = [f"round {now.round}", f"{format_rate(now.dirty_rate)} dirtied"]
        if now.expected_downtime is not None:
            second.append(f"expected downtime {format_duration(now.expected_downtime)}")
        if now.throttle:
            second.append(f"throttled by {now.throttle}%")
        if now.status == "pre-switchover":
            second.insert(0, "waits for migrate-continue")
        return [first, second]

    def line(self, now: MigrationInfo) -> str:
        """All of it."""
        return ", ".join([self.phase(now), *chain(*self.rows(now))])

    def content(self, now: MigrationInfo) -> dict[str, Any]:
        """All of it."""
        return now.to_json()


def taken(info: MigrationInfo) -> str:
    """What a migration that has completed took."""
    rate = info.transferred / info.total_time if info.total_time else info.rate
    parts = [
        f"{format_size(info.transferred)} in {format_duration(info.total_time)}",
        format_rate(rate),
        count(info.round, "round"),
    ]
    if info.downtime is not None:
        parts.append(f"downtime {format_duration(info.downtime)}")
    if info.confirmed is False:
        parts.append("nobody says whether it was loaded (the capability return-path asks)")
    return ", ".join(parts)


def described(machine: MachineStatus) -> Iterator[str]:
    """What a machine does, in a few lines."""
    state = name(machine.run_state)
    yield f"{name(machine.name)} is {state}" if machine.name else state
    for address in machine.listening:
        yield f"listening at {name(address)}"
    info = machine.migration
    if info.is_under_way:
        yield f"migration {Migrating().line(info)}"
        for reason in (info.stall, info.error):
            if reason:
                yield one_line(reason)
    elif info.status in ("completed", "sent") and info.total:
        yield f"migration {info.status}: {taken(info)}"
    elif info.status != "none":
        yield f"migration {name(info.status)}" + (f": {one_line(info.error)}" if info.error else "")
