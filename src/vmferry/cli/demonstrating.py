"""The demonstration in words: how it goes, and what it has proved."""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

from vmferry.demo import Moment, Moved, Proof, Side
from vmferry.machines import MachineConfig
from vmferry.machines.config import PAGE
from vmferry.machines.guest.layout import Layout
from vmferry.qemu import MigrationInfo
from vmferry.units import format_duration, format_rate, format_size

from .migrating import Migrating, taken
from .output import count
from .reports import Done

_HOSTS: Final = {"kvm": "KVM", "unicorn": "the Unicorn emulator"}
_NOBODY: Final = Side(0, "", 0, None)
_MIGRATING: Final = Migrating()
_ROUNDS: Final = 6
"""How many of the latest rounds are shown."""


class Demonstrating:
    """Progress of a demonstration."""

    first: Final = Moment(0, 0, MigrationInfo(), (), (_NOBODY, _NOBODY))

    def is_shown(self, now: Moment) -> bool:
        """From the start of the processes on."""
        return now.number > 0

    def phase(self, now: Moment) -> str:
        """Which move it is."""
        return f"move {now.number}"

    def share(self, now: Moment) -> float:
        """How much of the move is done."""
        if now.migration.has_ended:
            return 1.0
        return _MIGRATING.share(now.migration)

    def rows(self, now: Moment) -> list[list[str]]:
        """The migration, both processes, and what there was to send in each round."""
        migration = _migration(now.migration)
        rounds = ["rounds", *map(format_size, now.rounds[-_ROUNDS:])] if now.rounds else []
        # As many rows at any time, so that the picture does not jump.
        return [*migration, *([[]] * (2 - len(migration))), rounds, *map(_side, now.sides)]

    def line(self, now: Moment) -> str:
        """All but the rounds, for a log."""
        said = [
            f"process {side.pid} {side.state}, {count(side.heartbeats, 'heartbeat')}"
            for side in now.sides
        ]
        migration = ", ".join(chain(*_migration(now.migration)))
        return f"move {now.number}: {'; '.join([migration, *said])}"

    def content(self, now: Moment) -> dict[str, Any]:
        """All of it."""
        return {
            "move": now.number,
            "moves": now.moves,
            "rounds": list(now.rounds),
            "sides": [
                {
                    "pid": side.pid,
                    "state": side.state,
                    "heartbeats": side.heartbeats,
                    "guest_time": side.last.time / 1e9 if side.last else None,
                }
                for side in now.sides
            ],
            "migration": now.migration.to_json(),
        }


def _migration(info: MigrationInfo) -> list[list[str]]:
    """How the migration goes, or why none does."""
    if info.is_under_way:
        return _MIGRATING.rows(info) if info.total else [["connecting"]]
    return [["the guest checks its memory" if info.has_ended else "the guest fills its memory"]]


def _side(side: Side) -> list[str]:
    said = [f"process {side.pid} {side.state}"]
    if side.last is not None:
        said.append(count(side.heartbeats, "heartbeat"))
        said.append(f"guest time {side.last.time / 1e9:.2f} s")
        said.append(f"{side.last.hot:,} pages rewritten")
    return said


def machine(config: MachineConfig) -> Done:
    """The machine that is going to move."""
    guest = config.guest
    working_set = Layout.of(config).pages * PAGE
    rate = (guest.rate or 0) * PAGE
    text = (
        f"A machine with {format_size(config.ram)} of RAM runs on {_HOSTS[config.kind]}. Its guest"
        f" goes over {format_size(working_set)},\nrewrites {format_rate(rate)}, checks every page"
        f" that it comes to, and gives {round(1 / guest.heartbeat)} heartbeats a second."
    )
    content = {"kind": config.kind, "ram": config.ram, "working_set": working_set, "rate": rate}
    return Done(text, content)


def moved(move: Moved) -> Done:
    """A move that has completed."""
    text = (
        f"Move {move.number}, process {move.source} to {move.destination}:"
        f" {taken(move.migration)}.\n  By the guest's own clock it stood still for"
        f" {format_duration(move.stood_still)}."
    )
    content = {
        "move": move.number,
        "source": move.source,
        "destination": move.destination,
        "stood_still": round(move.stood_still, 6),
        "migration": move.migration.to_json(),
    }
    return Done(text, content)


def proof(found: Proof) -> Done:
    """What was found at the end."""
    downtimes = ", ".join(map(format_duration, found.downtimes))
    lines = [
        "The machine is intact:",
        f"  heartbeats  {found.heartbeats} in one unbroken row, whichever process they came from:",
        "              every line is whole, and its time and counts go on from those before",
        f"  memory      {found.pages:,} pages seen from outside, every byte as it has to be;",
        f"              {found.checked:,} checked by the guest, and none was lost, stale or torn",
        f"  downtime    {downtimes} by the guest's own clock",
    ]
    if found.records is not None:
        lines.append(
            f"  disk        {found.records} records of its journal, none lost, doubled or torn"
        )
    content = {
        "records": found.records,
        "heartbeats": found.heartbeats,
        "checked": found.checked,
        "pages": found.pages,
        "downtimes": [round(seconds, 6) for seconds in found.downtimes],
    }
    return Done("\n".join(lines), content)
