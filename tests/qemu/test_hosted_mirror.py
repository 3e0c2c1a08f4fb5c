"""Disks that are copied while a machine of vmferry moves: by the mirrors that QEMUs have too."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.command import vmferry
from tests.images.support import block_device, on_small_file_system
from tests.interop.lab import wait_until
from tests.migration.test_own_disks import (
    MIB,
    SIZES,
    config,
    contents,
    fill,
    journal,
    overlay,
    writing,
)
from vmferry.errors import PeerError, Refused, VmferryError
from vmferry.images import open_image
from vmferry.machines import MachineConfig
from vmferry.machines.config import OwnershipConfig
from vmferry.qemu import Migration, Qmp, QmpError
from vmferry.qemu.hosting import Host
from vmferry.qemu.mirror import StorageCopy

pytestmark = pytest.mark.qemu

LONG = 60.0


class Pair:
    """A machine that runs, one that waits for it with disks of its own, and their monitors."""

    def __init__(self, path: Path, stack: ExitStack, kind: str = "raw") -> None:
        self.path = path
        self._stack = stack
        self.left, self.right = (config(path, name, kind) for name in ("left", "right"))
        fill(self.left, 3)
        self.uri = f"unix:{path}/channel"

    def start(self, left: MachineConfig | None = None, right: MachineConfig | None = None) -> None:
        self.here = self._host(left or self.left, "here")
        self.here.console.wait_filled()
        self.there = self._host(right or self.right, "there", incoming=self.uri)
        self.source, self.destination = (self._monitor(name) for name in ("here", "there"))

    def _host(self, machine: MachineConfig, name: str, incoming: str | None = None) -> Host:
        host = Host(machine, incoming=incoming, monitor=f"{self.path}/{name}.qmp")
        return self._stack.enter_context(host)

    def _monitor(self, name: str) -> Qmp:
        return self._stack.enter_context(Qmp.connect(f"{self.path}/{name}.qmp"))

    def copy(self, **options: bool) -> StorageCopy:
        return StorageCopy(self.source, self.destination, f"unix:{self.path}/nbd", **options)

    def goes_on(self) -> None:
        """The machine runs where it was, nothing is left of the mirrors, nor in the other's way."""
        assert self.here.machine.running
        self.here.console.wait_beat()
        self.here.console.wait_beat()
        self.here.console.check()
        assert self.source.execute("query-jobs") == []

    def has_arrived(self) -> None:
        """It runs on the other side, and both sides have the same on their disks."""
        assert self.there.machine.running
        self.there.console.wait_beat()
        self.there.control.stop()
        for image in self.there.machine.images:
            image.inactivate()
        assert contents(self.left)[1] == contents(self.right)[1]
        assert journal(self.right) >= journal(self.left) > 0


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_disks_and_machine_arrive_together(tmp_path: Path, kind: str) -> None:
    with ExitStack() as stack:
        pair = Pair(tmp_path, stack, kind)
        pair.start()
        with writing(pair.here), pair.copy() as copy:
            assert copy.names == ["disk0", "disk1"]
            copy.wait_ready()
            migration = Migration(pair.source)
            migration.begin(pair.uri, before_switchover=copy.finish)
            assert migration.wait().status == "completed"
        assert pair.source.execute("query-jobs") == []
        pair.has_arrived()


def test_only_what_lies_above_a_backing_file_is_copied(pair: Pair) -> None:
    left, right = (overlay(pair.path, name) for name in ("above", "other"))
    pair.left, pair.right = left, right
    with open_image(left.disk[1].file, active=True, format="qcow2") as image:
        image.write(5 * MIB + 512, b"above" * 1000)
        image.write_zeroes(2 * MIB, 65536)
    pair.start()
    with pair.copy(incremental=True) as copy:
        copy.wait_ready()
        image = pair.here.machine.images[1]
        image.write_zeroes(3 * MIB, 65536)
        image.discard(6 * MIB, 131072)
        migration = Migration(pair.source)
        migration.begin(pair.uri, before_switchover=copy.finish)
        assert migration.wait().status == "completed"
    pair.has_arrived()
    with open_image(right.disk[1].file, active=True, format="qcow2") as image:
        own = [
            chunk
            for extent in image.allocated(own=True)
            for chunk in range(extent.offset // MIB, -(-extent.end // MIB))
        ]
    assert own == [2, 3, 5, 6]


def test_command_copies_and_moves(pair: Pair) -> None:
    pair.start()
    done = vmferry(
        *("migrate", f"{pair.path}/here.qmp", pair.uri, "--copy-storage"),
        *("--destination-qmp", f"{pair.path}/there.qmp"),
    )
    assert done.returncode == 0, done.stderr
    pair.has_arrived()


def test_copy_that_was_killed_can_be_begun_once_more(pair: Pair) -> None:
    pair.start()
    pair.copy().__enter__().wait_ready()  # and whoever has begun it is gone
    with pytest.raises(Refused, match="nbd-server-stop"):
        pair.copy().__enter__()
    pair.destination.execute("nbd-server-stop")
    for image in pair.here.machine.images:
        image.write(image.size - 512, bytes(512))  # so that the mirrors find out

    def have_ended() -> bool:
        return {job["status"] for job in pair.source.execute("query-jobs")} == {"concluded"}

    wait_until(have_ended)
    with pair.copy() as copy:
        copy.wait_ready()
    pair.goes_on()


def test_record_of_the_owner_goes_along(pair: Pair) -> None:
    record = OwnershipConfig(store=f"file:{pair.path}/owner")
    pair.start(replace(pair.left, ownership=record), replace(pair.right, ownership=record))
    with pair.copy() as copy:
        copy.wait_ready()
        migration = Migration(pair.source)
        capabilities = {"return-path": True}
        migration.begin(pair.uri, capabilities=capabilities, before_switchover=copy.finish)
        assert migration.wait().status == "completed"
    assert pair.source.execute("query-migrate")["x-vmferry-ownership"] == "gone"
    pair.has_arrived()


def test_mirror_goes_to_any_server(pair: Pair) -> None:
    """Without another machine: a copy of a disk in use, onto a server of QEMU's."""
    pair.start()
    socket, target = pair.path / "server", pair.path / "copy"
    with target.open("wb") as file:
        file.truncate(SIZES[1])
    command = ["qemu-nbd", "-f", "raw", "-x", "it", "-k", str(socket), "-t", str(target)]
    with subprocess.Popen(command) as server:
        try:
            wait_until(socket.exists)
            qmp = pair.source
            node = {"driver": "nbd", "node-name": "target", "export": "it"}
            qmp.execute("blockdev-add", node | {"server": {"type": "unix", "path": str(socket)}})
            mirror = {"device": "disk1", "target": "target", "sync": "full"}
            with writing(pair.here):
                qmp.execute("blockdev-mirror", mirror | {"job-id": "copy", "auto-dismiss": False})
                with pytest.raises(QmpError, match="there is a job"):
                    qmp.execute("blockdev-mirror", mirror | {"job-id": "copy"})
                with pytest.raises(QmpError, match="in use by a mirror"):
                    qmp.execute("blockdev-del", {"node-name": "target"})
                while (
                    qmp.wait_event("JOB_STATUS_CHANGE", timeout=LONG)["data"]["status"] != "ready"
                ):
                    pass
            (job,) = qmp.execute("query-jobs")
            assert job["total-progress"] >= job["current-progress"] > SIZES[1]
            qmp.execute("block-job-cancel", {"device": "copy"})
            while (
                qmp.wait_event("JOB_STATUS_CHANGE", timeout=LONG)["data"]["status"] != "concluded"
            ):
                pass
            qmp.execute("job-dismiss", {"id": "copy"})
            qmp.execute("blockdev-del", {"node-name": "target"})
        finally:
            server.terminate()
    for image in pair.here.machine.images:
        image.inactivate()
    assert contents(pair.left)[1] == target.read_bytes()


def test_server_that_dies_ends_the_mirror_and_nothing_else(pair: Pair) -> None:
    pair.start()

    def move() -> None:
        with pair.copy() as copy:
            copy.wait_ready()
            (daemon,) = storage_daemons()
            os.kill(daemon, signal.SIGKILL)
            migration = Migration(pair.source)
            migration.begin(pair.uri, before_switchover=copy.finish)
            migration.wait()

    with pytest.raises(VmferryError, match="disk0"):
        move()
    pair.goes_on()


def test_mirror_that_somebody_else_has_ended_is_no_copy(pair: Pair) -> None:
    pair.start()

    def move() -> None:
        with Qmp.connect(f"{pair.path}/here.qmp") as other, pair.copy() as copy:
            copy.wait_ready()

            def finish() -> None:
                pair.here.machine.images[1].write(0, b"what would be lost")
                other.execute("block-job-cancel", {"device": "vmferry-mirror-1", "force": True})
                copy.finish()

            migration = Migration(pair.source)
            migration.begin(pair.uri, before_switchover=finish)
            migration.wait()

    with pytest.raises(PeerError, match=r"disk1.*it was cancelled"):
        move()
    pair.goes_on()


@pytest.mark.parametrize("size", [0, 100, MIB + 100])
def test_disk_of_any_size(pair: Pair, size: int) -> None:
    """QEMU counts in sectors."""
    for machine in (pair.left, pair.right):
        os.truncate(machine.disk[1].file, size)
    pair.start()
    end = b"the end"[:size]
    pair.here.machine.images[1].write(size - len(end), end)
    with pair.copy() as copy:
        copy.wait_ready()
        migration = Migration(pair.source)
        migration.begin(pair.uri, before_switchover=copy.finish)
        assert migration.wait().status == "completed"
    assert Path(pair.right.disk[1].file).stat().st_size == size
    pair.has_arrived()


def storage_daemons() -> list[int]:
    """Those that this process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        status = (entry / "stat").read_text().rpartition(")")[2].split()
        if int(status[1]) == os.getpid() and b"storage-daemon" in (entry / "cmdline").read_bytes():
            found.append(int(entry.name))
    return found


def test_device_that_fails_at_the_source_ends_the_mirror(tmp_path: Path) -> None:
    """A loop device whose file was cut: the kernel says EIO for what is behind."""
    with ExitStack() as stack:
        pair = Pair(tmp_path, stack)
        backing = Path(pair.left.disk[1].file)
        device = stack.enter_context(block_device(backing))
        second = replace(pair.left.disk[1], file=device, direct=True)
        pair.start(replace(pair.left, disk=(pair.left.disk[0], second)))
        os.truncate(backing, 1 << 20)
        with pytest.raises(PeerError, match=r"disk1.*Input/output error"), pair.copy() as copy:
            copy.wait_ready()
        pair.goes_on()


FULL = """
import sys
import tempfile
from tests.qemu.test_hosted_mirror import *
target = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
    pair = Pair(Path(directory), stack)
    with target.open("wb") as file:
        file.truncate(SIZES[1])
    disks = (pair.right.disk[0], replace(pair.right.disk[1], file=str(target)))
    pair.start(right=replace(pair.right, disk=disks))
    try:
        with pair.copy() as copy:
            copy.wait_ready()
    except PeerError as error:
        print(error)
    pair.goes_on()
"""


def test_full_disk_at_the_destination_ends_the_mirror(tmp_path: Path) -> None:
    reason = on_small_file_system(tmp_path, FULL)
    assert "disk1" in reason
    assert "No space left on device" in reason


def test_machine_that_comes_while_its_disks_are_served_stays_with_its_source(pair: Pair) -> None:
    """Somebody has migrated it without that the mirrors have ended."""
    pair.start()
    with pair.copy() as copy:
        copy.wait_ready()
        migration = Migration(pair.source)
        migration.begin(pair.uri, capabilities={"return-path": True})
        with pytest.raises(PeerError, match="another process"):
            migration.wait()
    pair.goes_on()


def test_disks_that_do_not_match_are_refused(pair: Pair) -> None:
    pair.start(right=config(pair.path, "right", sizes=(SIZES[0], 2 * SIZES[1])))
    with pytest.raises(Refused, match="disk1"):
        pair.copy()
    pair.goes_on()


WRONG = [
    ("blockdev-add", {"driver": "file", "node-name": "a", "server": {}}, "driver nbd"),
    ("blockdev-add", {"driver": "nbd", "node-name": "disk0", "server": {}}, "there is a node"),
    ("blockdev-add", {"driver": "nbd", "node-name": "a", "server": {"type": "fd"}}, "a server of"),
    ("blockdev-del", {"node-name": "a"}, "no node"),
    ("blockdev-mirror", {"device": "disk7", "target": "a", "sync": "full"}, "no disk"),
    ("blockdev-mirror", {"device": "disk0", "target": "a", "sync": "full"}, "no node"),
    ("blockdev-mirror", {"device": "disk0", "target": "a", "sync": "none"}, "full or top"),
    ("block-job-cancel", {"device": "a"}, "no job"),
    ("job-dismiss", {"id": "a"}, "no job"),
    ("nbd-server-start", {"addr": {"type": "unix"}}, "data"),
    ("block-export-del", {"id": "a"}, "no NBD server"),
]


@pytest.mark.parametrize(("name", "arguments", "why"), WRONG)
def test_wrong_commands(pair: Pair, name: str, arguments: dict[str, object], why: str) -> None:
    pair.start()
    with pytest.raises(QmpError, match=why):
        pair.source.execute(name, arguments)


def test_record_beside_an_image_does_not_go_with_it(pair: Pair) -> None:
    """The other side would look for it beside an image of its own, when all has been copied."""
    pair.start(*(replace(machine, ownership=None) for machine in (pair.left, pair.right)))
    with pytest.raises(QmpError, match="cannot be beside one"), pair.copy():
        pass
    pair.goes_on()


def test_disk_that_is_read_only_is_not_filled(pair: Pair) -> None:
    disks = (pair.right.disk[0], replace(pair.right.disk[1], read_only=True))
    pair.start(right=replace(pair.right, disk=disks))
    qmp = pair.destination
    address = {"type": "unix", "data": {"path": f"{pair.path}/nbd"}}
    qmp.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "a", "node-name": "disk1", "writable": True}
    with pytest.raises(QmpError, match="read only"):
        qmp.execute("block-export-add", export)


def test_disks_of_a_machine_that_runs_are_not_served(pair: Pair) -> None:
    pair.start()
    qmp = pair.source
    address = {"type": "unix", "data": {"path": f"{pair.path}/nbd"}}
    qmp.execute("nbd-server-start", {"addr": address})
    with pytest.raises(QmpError, match="running already"):
        qmp.execute("nbd-server-start", {"addr": address})
    export = {"type": "nbd", "id": "a", "node-name": "disk0", "writable": True}
    with pytest.raises(QmpError, match="only while its machine is awaited"):
        qmp.execute("block-export-add", export)
    qmp.execute("nbd-server-stop")
    assert not storage_daemons()
