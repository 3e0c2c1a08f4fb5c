"""A migration driven by QMP: between real QEMUs, and with a monitor that does odd things."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.lab import Lab
from tests.qemu.monitor import Machine
from tests.transports.support import background
from vmferry.errors import PeerError, TransportError, UsageError
from vmferry.qemu import (
    Migration,
    MigrationCancelled,
    MigrationInfo,
    QemuProcess,
    Qmp,
    QmpError,
    query_machine,
)

HELD: dict[str, object] = {"max-bandwidth": "1MiB/s", "downtime-limit": "1ms"}
"""Keeps a walker from coming to an end."""


@pytest.fixture
def lab(start_qemu: Callable[..., QemuProcess], tmp_path: Path) -> Any:
    with Lab(start_qemu, tmp_path) as lab:
        yield lab


@pytest.mark.qemu
def test_machine_moves_between_qemus(lab: Lab) -> None:
    source, destination = lab.source(), lab.destination()
    uri = f"unix:{lab.directory()}/s"
    destination.qemu.incoming(uri)
    assert query_machine(destination.qemu.qmp).listening == (uri,)
    migration = Migration(source.qemu.qmp)
    seen: list[MigrationInfo] = []
    migration.begin(
        uri,
        capabilities={"return-path": True},
        parameters={"max-bandwidth": "64MiB/s", "downtime-limit": "2s"},
    )
    end = migration.wait(seen.append)
    assert end.status == "completed"
    assert end.confirmed
    assert end.total_time > 0
    assert end.downtime is not None
    assert end.transferred > 1 << 20
    assert end.round > 1
    assert {info.status for info in seen} <= {"setup", "active", "device"}
    lab.assert_goes_on(destination, source)
    status = query_machine(source.qemu.qmp)
    assert (status.run_state, status.is_running) == ("postmigrate", False)
    assert status.migration.status == "completed"


@pytest.mark.qemu
def test_progress_has_what_converges(lab: Lab) -> None:
    source, destination = lab.source(), lab.destination()
    destination.qemu.incoming(f"unix:{lab.directory()}/s")
    migration = Migration(source.qemu.qmp)
    uri = query_machine(destination.qemu.qmp).listening[0]
    migration.begin(uri, parameters=HELD)

    def look(now: MigrationInfo) -> None:
        # Dirty pages are counted over a second.
        if now.round > 2 and now.dirty_rate and now.rate and now.expected_downtime:
            seen.append(now)
            migration.cancel()

    seen: list[MigrationInfo] = []
    with pytest.raises(MigrationCancelled):
        migration.wait(look)
    assert 0 < seen[0].remaining < seen[0].total
    assert seen[0].transferred > 1 << 20


@pytest.mark.qemu
def test_cancelled_source_runs_on_and_may_try_again(lab: Lab) -> None:
    source, first, second = lab.source(), lab.destination(), lab.destination()
    uris = [f"unix:{lab.directory()}/s" for _ in range(2)]
    first.qemu.incoming(uris[0])
    second.qemu.incoming(uris[1])
    migration = Migration(source.qemu.qmp)
    migration.begin(uris[0], parameters=HELD)

    def cancel(now: MigrationInfo) -> None:
        if now.transferred:
            migration.cancel()

    with pytest.raises(MigrationCancelled, match="was cancelled; the source is running"):
        migration.wait(cancel)
    again = Migration(source.qemu.qmp)
    again.begin(uris[1], parameters={"max-bandwidth": "1GiB", "downtime-limit": "2s"})
    again.wait()
    lab.assert_goes_on(second, source)


@pytest.mark.qemu
def test_failure_has_the_machines_reason(lab: Lab) -> None:
    source = lab.source()
    migration = Migration(source.qemu.qmp)
    migration.begin(f"unix:{lab.path}/nobody")
    with pytest.raises(PeerError, match=r"failed: .*No such file.*; the source is running"):
        migration.wait()
    assert "No such file" in query_machine(source.qemu.qmp).migration.error


@pytest.mark.qemu
def test_second_migration_is_refused_and_changes_nothing(lab: Lab) -> None:
    source, destination = lab.source(), lab.destination()
    uri = f"unix:{lab.directory()}/s"
    destination.qemu.incoming(uri)
    Migration(source.qemu.qmp).begin(uri, parameters=HELD)
    with pytest.raises(UsageError, match="found a migration that is"):
        Migration(source.qemu.qmp).begin(uri, parameters={"max-bandwidth": "1GiB"})
    assert source.qemu.execute("query-migrate-parameters")["max-bandwidth"] == 1 << 20


@pytest.mark.qemu
def test_what_the_machine_does_not_know_is_refused(lab: Lab) -> None:
    source = lab.source()
    with pytest.raises(QmpError, match=r"refuses migrate-set-capabilities: .*flying"):
        Migration(source.qemu.qmp).begin("unix:/nowhere", capabilities={"flying": True})
    with pytest.raises(UsageError, match="no migration parameter"):
        Migration(source.qemu.qmp).begin("unix:/nowhere", parameters={"altitude": "1GiB"})
    assert query_machine(source.qemu.qmp).migration.status == "none"


ACTIVE = {"status": "active", "ram": {"transferred": 1, "remaining": 2, "total": 3}}


def test_cancelled_before_it_began_it_does_not_begin(tmp_path: Path) -> None:
    with Machine(tmp_path / "m") as machine, Qmp.connect(machine.address) as qmp:
        migration = Migration(qmp)
        migration.cancel()
        with pytest.raises(MigrationCancelled, match="before it began"):
            migration.begin("unix:/nowhere")
        assert "migrate" not in {command for command, _ in machine.heard}


def test_cancelling_does_not_wait_for_the_monitor(tmp_path: Path) -> None:
    answered = threading.Event()

    def slow() -> dict[str, object]:
        answered.wait(20)
        return {"status": "cancelled"}

    with (
        Machine(tmp_path / "m", query_migrate=slow) as machine,
        Qmp.connect(machine.address) as qmp,
    ):
        migration = Migration(qmp)
        outcome = background(migration.wait)
        migration.cancel()
        answered.set()
        with pytest.raises(MigrationCancelled):
            outcome.result(20)


def test_postcopy_is_not_cancelled(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "m", query_migrate={"status": "postcopy-active"})
    with machine, Qmp.connect(machine.address) as qmp:
        migration = Migration(qmp)
        migration.cancel()
        with pytest.raises(PeerError, match="in postcopy cannot be cancelled"):
            migration.wait()
        assert "migrate_cancel" not in {command for command, _ in machine.heard}


def test_outcome_is_unknown_when_the_monitor_goes_away(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "m", query_migrate=[ACTIVE, OSError()])
    with (
        machine,
        Qmp.connect(machine.address) as qmp,
        pytest.raises(TransportError, match=r"expected the answer to query-migrate|broke"),
    ):
        Migration(qmp).wait()


def test_source_is_given_time_to_run_again(tmp_path: Path) -> None:
    stopped, runs = {"status": "finish-migrate"}, {"status": "running"}
    machine = Machine(
        tmp_path / "m",
        query_migrate={"status": "failed", "error-desc": "no\nspace\x1b[2J"},
        query_status=[stopped, stopped, runs],
    )
    with machine, Qmp.connect(machine.address) as qmp, pytest.raises(PeerError) as caught:
        Migration(qmp).wait()
    assert str(caught.value) == (
        'the migration failed: "no\\nspace\\x1b[2J"; the source is running'
    )


def test_without_a_return_path_nothing_is_confirmed(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "m", query_migrate=[{}, ACTIVE, {"status": "completed"}])
    with machine, Qmp.connect(machine.address) as qmp:
        migration = Migration(qmp)
        migration.begin("unix:/x")
        assert migration.wait().confirmed is False


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 7, "ram": []},
        {"status": "active", "ram": {"transferred": "x", "remaining": -3, "total": None}},
        {"ram": {"mbps": float("inf"), "dirty-pages-rate": True}, "total-time": {}},
        {"expected-downtime": float("nan"), "error-desc": ["no"]},
    ],
)
def test_nonsense_counts_as_nothing(answer: dict[str, object]) -> None:
    info = MigrationInfo.from_qmp(answer)
    json.dumps(info.to_json(), allow_nan=False)
    assert (info.transferred, info.remaining, info.total, info.rate) == (0, 0, 0, 0.0)
    assert info.expected_downtime is None


def test_answer_of_another_kind_is_an_error(tmp_path: Path) -> None:
    with (
        Machine(tmp_path / "m", query_status=3) as machine,
        Qmp.connect(machine.address) as qmp,
        pytest.raises(PeerError, match="expected an object as the answer to query-status"),
    ):
        query_machine(qmp)


def test_addresses_are_uris(tmp_path: Path) -> None:
    addresses = [
        {"type": "inet", "host": "::1", "port": "4444"},
        {"type": "inet", "host": "127.0.0.1", "port": "4445"},
        {"type": "unix", "path": "/x"},
        {"type": "vsock", "cid": "1"},
        "nonsense",
    ]
    machine = Machine(tmp_path / "m", query_migrate={"socket-address": addresses})
    with machine, Qmp.connect(machine.address) as qmp:
        status = query_machine(qmp)
    assert status.listening == ("tcp:[::1]:4444", "tcp:127.0.0.1:4445", "unix:/x")
    assert status.to_json()["listening"] == list(status.listening)
