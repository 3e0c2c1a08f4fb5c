from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vmferry.errors import PeerError, TransportError, UsageError
from vmferry.qemu import QemuProcess, QmpError, find_qemu

Start = Callable[..., QemuProcess]

NOTHING = ("-machine", "none")
SMALL = ("-machine", "pc", "-nodefaults", "-m", "4", "-S")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_missing_qemu_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VMFERRY_QEMU", raising=False)
    with pytest.raises(
        UsageError, match=r"^qemu-system-x86_64 cannot be found; install QEMU"
    ) as caught:
        QemuProcess(NOTHING).__enter__()
    assert "\n" not in str(caught.value)


def test_variable_names_another_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "my-qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("VMFERRY_QEMU", str(program))
    assert find_qemu() == str(program)
    monkeypatch.setenv("VMFERRY_QEMU", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"VMFERRY_QEMU names .*gone"):
        find_qemu()


def test_program_that_fails_to_start_shows_its_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "broken-qemu"
    program.write_text("#!/bin/sh\necho no such luck >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("VMFERRY_QEMU", str(program))
    with pytest.raises(PeerError, match="QEMU ended with status 3: no such luck"):
        QemuProcess(NOTHING).__enter__()


def test_file_that_is_no_program_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "data"
    program.write_bytes(b"\0\1\2")
    program.chmod(0o755)
    monkeypatch.setenv("VMFERRY_QEMU", str(program))
    with pytest.raises(UsageError, match=r"cannot start .*: Exec format error"):
        QemuProcess(NOTHING).__enter__()


@pytest.mark.qemu
def test_qemu_refusing_its_options_says_which() -> None:
    with pytest.raises(PeerError, match=r"status 1: .*no-such-machine|unsupported machine"):
        QemuProcess(["-machine", "no-such-machine"]).__enter__()


@pytest.mark.qemu
def test_nothing_is_left_after_the_block() -> None:
    with QemuProcess(NOTHING) as vm:
        pid, directory = vm.pid, vm.directory
        assert alive(pid)
        assert directory.is_dir()
    assert not alive(pid)
    assert not directory.exists()


@pytest.mark.qemu
def test_error_in_the_block_ends_qemu_too() -> None:
    started = QemuProcess(NOTHING)
    with pytest.raises(QmpError), started as vm:
        vm.execute("fly")
    assert not alive(started.pid)


@pytest.mark.qemu
def test_refused_command_is_a_qmp_error(start_qemu: Start) -> None:
    vm = start_qemu(*NOTHING)
    with pytest.raises(QmpError, match="refuses fly") as caught:
        vm.execute("fly")
    assert caught.value.kind == "CommandNotFound"


@pytest.mark.qemu
def test_events_follow_stop_and_cont(start_qemu: Start) -> None:
    vm = start_qemu(*SMALL)
    vm.execute("cont")
    vm.wait_running()
    vm.execute("stop")
    assert vm.qmp.wait_event("STOP")["timestamp"]["seconds"] > 0
    assert vm.qmp.wait_event("RESUME")


@pytest.mark.qemu
def test_death_of_qemu_shows_in_the_next_command(start_qemu: Start) -> None:
    vm = start_qemu(*NOTHING)
    vm.execute("quit")
    assert vm.wait_exit() == 0
    with pytest.raises(PeerError, match="QEMU ended with status 0"):
        vm.execute("query-status")


@pytest.mark.qemu
def test_migration_goes_from_one_to_the_other(start_qemu: Start) -> None:
    source = start_qemu(*SMALL)
    destination = start_qemu(*SMALL, "-incoming", "defer")
    assert source.query_migrate() == {}
    uri = f"unix:{destination.directory / 'migration'}"
    destination.incoming(uri, capabilities=["multifd"], parameters={"multifd-channels": 3})
    source.migrate(uri, capabilities=["multifd"], parameters={"multifd-channels": 3})
    assert source.wait_migration()["ram"]["total"] > 4 << 20
    destination.wait_migration()
    assert destination.execute("query-status")["status"] == "prelaunch"


@pytest.mark.qemu
def test_failed_migration_tells_the_reason(start_qemu: Start) -> None:
    vm = start_qemu(*SMALL)
    vm.migrate("exec:exit 1")
    with pytest.raises(PeerError, match="expected the migration to be completed, found failed"):
        vm.wait_migration()


@pytest.mark.qemu
def test_migration_that_does_not_move_has_a_deadline(start_qemu: Start) -> None:
    vm = start_qemu(*SMALL)
    vm.migrate("exec:cat >/dev/null", capabilities=["pause-before-switchover"])
    vm.wait_migration("pre-switchover")
    with pytest.raises(TransportError, match="still pre-switchover, not completed"):
        vm.wait_migration(timeout=0.05)


@pytest.mark.qemu
def test_memory_is_saved_as_the_guest_sees_it(start_qemu: Start) -> None:
    vm = start_qemu(*SMALL)
    vm.save_memory(vm.directory / "rom", 0xF0000, 0x10000)
    assert (
        vm.hmp("xp /1xb 0xffff0").split()[1] == f"{(vm.directory / 'rom').read_bytes()[-16]:#04x}"
    )
