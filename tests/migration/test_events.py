"""What happens to a migration, and what of it a QMP client hears."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from vmferry.migration.events import (
    DowntimeRaised,
    Event,
    Pass,
    Resumed,
    Stalled,
    StatusChanged,
    Stopped,
    Throttled,
    Warned,
    to_qmp,
)
from vmferry.migration.stall import Stall
from vmferry.migration.statistics import LiveProgress
from vmferry.migration.status import Status
from vmferry.qemu import QemuProcess


def test_what_monitors_hear_of() -> None:
    stall = Stall(5, 2.5, 1 << 20, 1.0, 1.0, 300)
    assert to_qmp(Stalled(stall)) == ("VMFERRY_STALLED", {"message": str(stall)})
    assert to_qmp(Warned("a")) == ("VMFERRY_WARNING", {"message": "a"})
    assert to_qmp(Stopped()) == ("STOP", {})
    assert to_qmp(Resumed()) == ("RESUME", {})


def test_statuses_and_passes_are_events_of_qmp() -> None:
    assert to_qmp(StatusChanged(Status.PRE_SWITCHOVER)) == (
        "MIGRATION",
        {"status": "pre-switchover"},
    )
    assert to_qmp(Pass(3, 4096)) == ("MIGRATION_PASS", {"pass": 3})


@pytest.mark.parametrize(
    "event",
    [
        LiveProgress("active"),
        Throttled(20),
        DowntimeRaised(450),
    ],
)
def test_the_others_are_not(event: Event) -> None:
    assert to_qmp(event) is None


@pytest.mark.qemu
def test_qemu_says_the_same(start_qemu: Callable[..., QemuProcess], tmp_path: Path) -> None:
    machine = ("-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "8", "-S")
    there = start_qemu(*machine, "-incoming", "defer")
    there.incoming(f"unix:{tmp_path / 'there'}")
    here = start_qemu(*machine)
    here.migrate(f"unix:{tmp_path / 'there'}", capabilities=["events"])
    here.wait_migration()
    told = [here.qmp.wait_event("MIGRATION", "MIGRATION_PASS") for _ in range(5)]
    assert [(one["event"], one["data"]) for one in told] == [
        to_qmp(StatusChanged(Status.SETUP)),
        to_qmp(Pass(1, 8 << 20)),
        to_qmp(StatusChanged(Status.ACTIVE)),
        to_qmp(Pass(2, 0)),
        to_qmp(StatusChanged(Status.COMPLETED)),
    ]
