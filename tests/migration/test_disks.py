"""A guest that keeps a journal on a shared disk is moved, and none of its records is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.migration.runs_of_vmferry import LONG, SIZE, Process, afterwards, config, goes_on
from tests.transports.support import wait_until
from vmferry import TransportError
from vmferry.errors import ImageInactive, StorageError, UsageError
from vmferry.images import open_image
from vmferry.machines import MachineConfig
from vmferry.machines.config import OwnershipConfig, to_toml
from vmferry.machines.guest.journal import read_journal
from vmferry.migration.status import Status
from vmferry.qemu.hosting import Host

FORMATS = ["raw", "qcow2"]


def journal(machine: MachineConfig) -> int:
    """The number of the last record, by a reader of its own; fails for a fault."""
    disk = machine.disk[0]
    with open_image(disk.file, active=True, format=disk.format, read_only=True) as image:
        data = bytearray(image.size)
        image.read(0, data)
    found = read_journal(data)
    assert not found.faults
    if disk.format != "raw":
        subprocess.run(["qemu-img", "check", "-q", disk.file], check=True)
    return found.last


def moved(here: Host, there: Host) -> None:
    assert there.address is not None
    here.control.migrate(there.address)
    assert here.control.wait(LONG) is Status.COMPLETED, here.control.error
    assert there.control.wait(LONG) is Status.COMPLETED, there.control.error


@pytest.mark.parametrize("kind", FORMATS)
def test_journal_goes_on_over_many_moves(tmp_path: Path, kind: str) -> None:
    machine = config(tmp_path, kind)
    with ExitStack() as stack:
        here = stack.enter_context(Host(machine))
        here.console.wait_filled()
        last = -1
        for move in range(6):
            there = stack.enter_context(Host(machine, incoming=f"unix:{tmp_path}/{move}"))
            assert not there.machine.images[0].active
            moved(here, there)
            assert not here.machine.images[0].active
            there.console.wait_beat()
            there.console.wait_beat()
            here = there
        here.control.stop()
        here.console.check()
        here.machine.images[0].inactivate()
        last = journal(machine)
        assert last > 12


def trace(host: Host, name: str, events: list[str]) -> None:
    """Note what is done to a machine, in order."""
    machine, image = host.machine, host.machine.images[0]

    def noting(what: str, call: Callable[[], None]) -> Callable[[], None]:
        def noted() -> None:
            call()
            events.append(f"{name} {what}")

        return noted

    for what in ("pause", "resume"):
        setattr(machine, what, noting(what, getattr(machine, what)))
    for what in ("activate", "inactivate"):
        setattr(image, what, noting(what, getattr(image, what)))


def test_order_of_a_switchover(tmp_path: Path) -> None:
    machine = config(tmp_path)
    events: list[str] = []
    with Host(machine) as here, Host(machine, incoming=f"unix:{tmp_path}/socket") as there:
        here.console.wait_filled()
        trace(here, "source", events)
        trace(there, "destination", events)
        moved(here, there)
        # It is paused once more, to be sure, before the record is changed.
        assert list(dict.fromkeys(events))[:4] == [
            "source pause",
            "source inactivate",
            "destination activate",
            "destination resume",
        ]
        assert events.count("source inactivate") == events.count("destination resume") == 1


def test_machine_that_arrives_stopped_can_leave_its_disks_alone(tmp_path: Path) -> None:
    machine = config(tmp_path)
    with Host(machine) as here, Host(machine, incoming="defer", monitor=tmp_path / "m") as there:
        here.console.wait_filled()
        here.control.stop()
        there.control.set_capabilities({"late-block-activate": True})
        here.control.migrate(there.control.incoming(f"unix:{tmp_path}/socket"))
        assert here.control.wait(LONG) is Status.COMPLETED
        assert there.control.wait(LONG) is Status.COMPLETED
        image = there.machine.images[0]
        assert not image.active
        with pytest.raises(ImageInactive):
            image.write(0, bytes(512))
        there.control.cont()
        assert image.active
        there.console.wait_beat()


def test_source_goes_on_where_its_disk_cannot_be_taken(tmp_path: Path) -> None:
    """Somebody else has the image at the very moment when the destination wants it."""
    machine = config(tmp_path)
    with Host(machine) as here, Host(machine, incoming=f"unix:{tmp_path}/socket") as there:
        here.console.wait_filled()

        def refuse() -> None:
            raise StorageError(f"{machine.disk[0].file}: stands for a disk that vanished")

        there.machine.images[0].activate = refuse  # type: ignore[method-assign]
        assert there.address is not None
        here.control.migrate(there.address)
        assert here.control.wait(LONG) is Status.FAILED
        assert "vanished" in str(here.control.error)
        assert here.machine.running
        assert here.machine.images[0].active
        here.console.wait_beat()
        here.console.check()


def test_disks_of_different_sizes_are_refused(tmp_path: Path) -> None:
    machine = config(tmp_path)
    (tmp_path / "other").mkdir()
    other = config(tmp_path / "other")
    with Path(other.disk[0].file).open("r+b") as file:
        file.truncate(2 * SIZE)
    with Host(machine) as here, Host(other, incoming=f"unix:{tmp_path}/socket") as there:
        here.console.wait_filled()
        assert there.address is not None
        here.control.migrate(there.address)
        assert here.control.wait(LONG) is Status.FAILED
        assert "disk" in str(here.control.error)
        assert here.machine.running
        here.console.wait_beat()


def test_two_machines_cannot_have_the_same_disk(tmp_path: Path) -> None:
    machine = config(tmp_path)
    with Host(machine) as here:
        here.console.wait_filled()
        with pytest.raises(UsageError, match="held by"), Host(machine):
            pass
        alone = replace(machine, ownership=OwnershipConfig(store="none"))
        with pytest.raises(StorageError, match="lock"), Host(alone):
            pass


# Processes that are killed


@contextmanager
def pair(path: Path, *, source: str = "", destination: str = "") -> Iterator[tuple[Process, ...]]:
    """A machine that begins to move to another process."""
    machine = config(path)
    file = path / "machine.toml"
    file.write_text(to_toml(machine))
    uri = f"unix:{path}/channel"
    with (
        Process(file, path / "here", fault=source) as here,
        Process(file, path / "there", "--incoming", uri, fault=destination) as there,
    ):
        journal_began = machine.disk[0].file
        wait_until(lambda: any(Path(journal_began).read_bytes()[:512]), LONG)
        with suppress(TransportError):
            here.qmp.execute("migrate", {"uri": uri})
        yield here, there


@pytest.mark.parametrize("point", ["stopped", "images-inactive", "devices-sent"])
def test_source_that_dies_leaves_a_disk_that_can_be_used(tmp_path: Path, point: str) -> None:
    with pair(tmp_path, source=f"{point}:kill") as (source, destination):
        source.wait_death()
        destination.wait_end()
    last = afterwards(tmp_path)
    with Process(tmp_path / "machine.toml", tmp_path / "again") as again:
        wait_until(lambda: again.run_state == "running", LONG)
    assert last >= 0


@pytest.mark.parametrize("point", ["offered", "ready-heard", "go-said", "shut-heard"])
def test_source_that_dies_late_leaves_the_disk_to_the_destination(
    tmp_path: Path, point: str
) -> None:
    with pair(tmp_path, source=f"{point}:kill") as (source, destination):
        source.wait_death()
        wait_until(lambda: destination.run_state == "running", LONG)
        goes_on(tmp_path)
    afterwards(tmp_path)


@pytest.mark.parametrize("point", ["go-heard", "images-active"])
def test_destination_that_dies_as_the_owner_takes_the_machine_along(
    tmp_path: Path, point: str
) -> None:
    """The record says that it has started: as behind any crash, the machine starts anew."""
    with pair(tmp_path, destination=f"{point}:kill") as (source, destination):
        destination.wait_death()
        wait_until(lambda: source.status() in {"completed", "failed"}, LONG)
        assert source.run_state != "running"
        before = afterwards(tmp_path)
        with Process(tmp_path / "machine.toml", tmp_path / "again") as again:
            wait_until(lambda: again.run_state == "running", LONG)
            assert source.run_state != "running"
    assert before >= 0


@pytest.mark.parametrize("point", ["loaded", "ready-said"])
def test_destination_that_dies_gives_the_disk_back(tmp_path: Path, point: str) -> None:
    with pair(tmp_path, destination=f"{point}:kill") as (source, destination):
        destination.wait_death()
        wait_until(lambda: source.status() == "failed", LONG)
        wait_until(lambda: source.run_state == "running", LONG)
        goes_on(tmp_path)
    afterwards(tmp_path)


@pytest.mark.parametrize("point", ["stopped", "images-inactive", "devices-sent", "offered"])
def test_source_that_fails_has_its_disk_back(tmp_path: Path, point: str) -> None:
    with pair(tmp_path, source=f"{point}:fail") as (source, _):
        wait_until(lambda: source.status() == "failed", LONG)
        wait_until(lambda: source.run_state == "running", LONG)
        goes_on(tmp_path)
    afterwards(tmp_path)


def test_reader_of_the_journal_finds_faults(tmp_path: Path) -> None:
    machine = config(tmp_path)
    with Host(machine) as here:
        here.console.wait_filled()
        wait_until(lambda: here.console.count > 150, LONG)  # once around
        here.control.stop()
    whole = bytearray(Path(machine.disk[0].file).read_bytes())
    last = read_journal(whole).last
    assert last >= SIZE // 512
    lost, torn, old = (bytearray(whole) for _ in range(3))
    lost[:512] = bytes(512)
    torn[3 * 512 + 256 : 4 * 512] = bytes(256)
    place = last % (SIZE // 512)
    old[place * 512 : (place + 1) * 512] = whole[(place - 1) * 512 : place * 512] or bytes(512)
    for broken in (lost, torn, old):
        assert read_journal(broken).faults
