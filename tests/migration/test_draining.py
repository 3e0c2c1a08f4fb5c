"""Storage that hangs when a machine is to be switched over: servers stopped by a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.images.support import make, nbd_server
from tests.migration.test_disks import LONG, config, journal
from tests.migration.test_own_disks import daemon_of
from tests.qemu.hosts import Hosts
from tests.transports.support import background, wait_until
from vmferry.errors import StorageError
from vmferry.images import open_image
from vmferry.machines import DiskConfig, MachineConfig
from vmferry.machines.config import OwnershipConfig
from vmferry.migration.control import RunState
from vmferry.migration.status import Status
from vmferry.qemu.hosting import Host

pytestmark = pytest.mark.qemu


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def hosts(stack: ExitStack, tmp_path: Path) -> Hosts:
    return Hosts(stack, tmp_path)


@pytest.fixture(params=["daemon", "server"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MachineConfig]:
    """A machine whose journal is on a qcow2 image, or on a server of NBD."""
    alone = OwnershipConfig(store="none")
    if request.param == "daemon":
        yield replace(config(tmp_path, "qcow2"), ownership=alone)
        return
    machine = config(tmp_path)
    with nbd_server("-f", "raw", machine.disk[0].file, at=tmp_path / "s") as uri:
        yield replace(machine, disk=(DiskConfig(file=uri),), ownership=alone)


@contextmanager
def hanging(image: str) -> Iterator[None]:
    """The process that has the image does nothing."""
    process = daemon_of(image.rpartition("=")[2])
    assert process is not None
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


@contextmanager
def waiting(host: Host) -> Iterator[None]:
    """The guest waits for a request of its disk, which hangs."""
    host.console.wait_filled()
    image = host.machine.images[0]
    with hanging(image.name):
        wait_until(lambda: image.busy, LONG)
        yield


def goes_on(host: Host) -> None:
    host.console.wait_beat()
    host.console.wait_beat()
    host.console.check()


def moves(hosts: Hosts, here: Host) -> Host:
    there, _ = hosts.start(here.machine.config, incoming=hosts.uri())
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.COMPLETED, here.control.error
    assert there.control.wait(LONG) is Status.COMPLETED
    goes_on(there)
    return there


def test_request_that_hangs_fails_the_migration_and_not_the_machine(
    hosts: Hosts, machine: MachineConfig
) -> None:
    here, _ = hosts.start(machine)
    there, _ = hosts.start(machine, incoming=hosts.uri())
    here.control.set_parameters({"x-vmferry-drain-deadline": 0.3})
    with waiting(here):
        here.control.migrate(str(there.address))
        assert here.control.wait(LONG) is Status.FAILED
        words = "what the machine has asked for was not done within 0.3 s"
        assert f"{machine.disk[0].file}: {words}" in str(here.control.error)
        assert there.control.wait(LONG) is Status.FAILED
        assert here.control.run_state is RunState.RUNNING
    goes_on(here)
    here.control.set_parameters({"x-vmferry-drain-deadline": 30})
    there = moves(hosts, here)
    there.control.stop()
    there.machine.images[0].inactivate()
    assert journal(machine) > 0


@pytest.mark.parametrize("owned", [False, True])
def test_cancelled_while_it_waits(hosts: Hosts, tmp_path: Path, owned: bool) -> None:
    machine = config(tmp_path, "qcow2")
    store = f"file:{tmp_path}/owner" if owned else "none"
    machine = replace(machine, ownership=OwnershipConfig(store=store))
    here, qmp = hosts.start(machine)
    there, _ = hosts.start(machine, incoming=hosts.uri())
    here.control.set_parameters({"x-vmferry-drain-deadline": 0})
    with waiting(here):
        here.control.migrate(str(there.address))
        wait_until(lambda: here.control.run_state is RunState.FINISH_MIGRATE, LONG)
        assert qmp.execute("query-migrate")["status"] == "active"
        qmp.execute("migrate_cancel", timeout=LONG)
        assert here.control.wait(LONG) is Status.CANCELLED
        assert here.control.run_state is RunState.RUNNING
    goes_on(here)
    moves(hosts, here)


def test_flush_that_hangs_leaves_the_machine_to_its_other_disks(
    hosts: Hosts, tmp_path: Path
) -> None:
    machine = config(tmp_path)
    second = make(tmp_path / "second.qcow2", "qcow2")
    disks = (*machine.disk, DiskConfig(file=str(second), format="qcow2"))
    machine = replace(machine, disk=disks, ownership=OwnershipConfig(store="none"))
    here, _ = hosts.start(machine)
    there, _ = hosts.start(machine, incoming=hosts.uri())
    here.control.set_parameters({"x-vmferry-drain-deadline": 0.3})
    here.console.wait_filled()
    with hanging(str(second)):
        here.control.migrate(str(there.address))
        assert here.control.wait(LONG) is Status.FAILED
        assert f"{second}: what the machine has asked for" in str(here.control.error)
        goes_on(here)
    moves(hosts, here)


def test_cancelled_between_its_stop_and_the_inactivation_it_keeps_its_disks(
    hosts: Hosts, tmp_path: Path
) -> None:
    """The moment is made: somebody cancels while the images are flushed."""
    machine = replace(config(tmp_path), ownership=OwnershipConfig(store="none"))
    here, _ = hosts.start(machine)
    there, _ = hosts.start(machine, incoming=hosts.uri())
    here.console.wait_filled()
    image = here.machine.images[0]
    flush = image.flush

    def cancelled() -> None:
        if here.control.run_state is RunState.FINISH_MIGRATE:
            here.control.cancel()
        flush()

    image.flush = cancelled  # type: ignore[method-assign]
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.CANCELLED
    assert here.control.run_state is RunState.RUNNING
    assert image.active
    goes_on(here)
    assert here.control.run_state is RunState.RUNNING


def test_flush_is_made_once(tmp_path: Path) -> None:
    """What was flushed before the last moment is not flushed then, when the machine stands still.

    The server does not answer any more, and is not asked.
    """
    path = make(tmp_path / "disk", "raw")
    with nbd_server("-f", "raw", str(path), at=tmp_path / "s") as uri:
        image = open_image(uri, active=True)
        image.write(0, b"data")
        image.flush()
    image.inactivate()
    assert not image.active
    with nbd_server("-f", "raw", str(path), at=tmp_path / "t") as uri:
        image = open_image(uri, active=True)
        image.flush()
        image.write(0, b"data")
    with pytest.raises(StorageError):
        image.inactivate()
    with pytest.raises(StorageError):
        image.close()


def test_flush_waits_for_one_that_hangs(tmp_path: Path) -> None:
    """Another flush under way says nothing of what is durable before it has ended."""
    path = make(tmp_path / "disk.qcow2", "qcow2")
    with open_image(path, active=True, format="qcow2") as image:
        image.write(0, b"data")
        with hanging(str(path)):
            flushes = [background(image.flush) for _ in range(2)]
            with pytest.raises(TimeoutError):
                flushes[1].result(0.2)
        for flush in flushes:
            flush.result(LONG)
