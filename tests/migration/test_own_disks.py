"""A machine moves together with its disks, onto images that the other side has to itself."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.images.support import block_device, children, nbd_server, on_small_file_system
from tests.migration.test_disks import LONG
from tests.transports.support import wait_until
from vmferry.errors import StorageError, UsageError
from vmferry.images import open_image
from vmferry.machines import DiskConfig, GuestConfig, MachineConfig
from vmferry.machines.config import OwnershipConfig
from vmferry.machines.guest.journal import read_journal
from vmferry.migration.incoming_disks import IncomingDisks
from vmferry.migration.status import Status
from vmferry.qemu.hosting import Host
from vmferry.wire.disk import DiskChunk

MIB = 1 << 20
SIZES = (2 * MIB + 1536, 9 * MIB + 512)
"""Of the disk with the journal, and of one with content; both end within a chunk."""


def config(
    path: Path, name: str, kind: str = "raw", sizes: tuple[int, ...] = SIZES
) -> MachineConfig:
    """A machine with images of its own, which are empty."""
    disks = []
    for number, size in enumerate(sizes):
        image = path / f"{name}{number}.{kind}"
        command = ["qemu-img", "create", "-q", "-f", kind, str(image), str(size)]
        subprocess.run(command, check=True)
        disks.append(DiskConfig(file=str(image), format=kind))
    return MachineConfig(
        ram=4 * MIB,
        guest=GuestConfig(working_set=256 << 10, rate=2000, heartbeat=0.001),
        disk=tuple(disks),
        ownership=OwnershipConfig(store="none"),
    )


def contents(machine: MachineConfig) -> list[bytes]:
    """What is on the disks, by a reader of its own."""
    found = []
    for disk in machine.disk:
        raw = Path(disk.file).with_suffix(".content")
        command = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", disk.file, str(raw)]
        subprocess.run(command, check=True)
        if disk.format != "raw":
            subprocess.run(["qemu-img", "check", "-q", disk.file], check=True)
        found.append(raw.read_bytes())
    return found


def fill(machine: MachineConfig, seed: int) -> None:
    """Put noise on the second disk, with holes between."""
    disk = machine.disk[1]
    chance = random.Random(seed)  # noqa: S311
    with open_image(disk.file, active=True, format=disk.format) as image:
        for start in range(0, image.size, MIB):
            if start // MIB % 3:
                image.write(start, chance.randbytes(min(600_000, image.size - start)))


@contextmanager
def writing(host: Host) -> Iterator[None]:
    """Write the second disk all the time, as a device does: until the machine is stopped."""
    image, pause = host.machine.images[1], host.machine.pause
    chance = random.Random(1)  # noqa: S311
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            offset = chance.randrange(image.size // 512) * 512
            match chance.randrange(8):
                case 0:
                    image.discard(offset, min(65536, image.size - offset))
                case 1:
                    image.write_zeroes(offset, min(65536, image.size - offset))
                case _:
                    image.write(offset, chance.randbytes(512))
            done.wait(0.0005)

    writer = threading.Thread(target=work)

    def drained() -> None:
        done.set()
        writer.join()
        pause()

    host.machine.pause = drained  # type: ignore[method-assign]
    writer.start()
    try:
        yield
    finally:
        drained()


class Moves:
    """Machines with images of their own, one behind the other."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._stack = stack
        self._count = 0

    def waiting(
        self, machine: MachineConfig, *capabilities: str, incremental: bool = False
    ) -> tuple[Host, str]:
        self._count += 1
        name = self.path / f"{self._count}"
        host = Host(machine, incoming="defer", monitor=f"{name}.qmp")
        self._stack.enter_context(host)
        host.control.set_capabilities(dict.fromkeys(capabilities, True))
        host.control.set_parameters({"block-incremental": incremental})
        return host, host.control.incoming(f"unix:{name}")

    def running(self, machine: MachineConfig, *capabilities: str) -> Host:
        host = self._stack.enter_context(Host(machine))
        host.control.set_capabilities(dict.fromkeys(capabilities, True))
        host.console.wait_filled()
        return host


@pytest.fixture
def moves(tmp_path: Path) -> Iterator[Moves]:
    with ExitStack() as stack:
        yield Moves(tmp_path, stack)


def moved(here: Host, there: Host, address: str) -> None:
    here.control.migrate(address)
    assert here.control.wait(LONG) is Status.COMPLETED, here.control.error
    assert there.control.wait(LONG) is Status.COMPLETED, there.control.error


def journal(machine: MachineConfig) -> int:
    data = contents(machine)[0]
    found = read_journal(data[: len(data) // 512 * 512])
    assert not found.faults
    return found.last


@pytest.mark.parametrize(
    ("kinds", "capabilities"),
    [
        (("raw", "raw"), ()),
        (("raw", "raw"), ("zero-blocks", "multifd")),
        (("raw", "qcow2"), ("zero-blocks",)),
    ],
)
def test_disks_arrive_as_they_were_left(
    moves: Moves, kinds: tuple[str, str], capabilities: tuple[str, ...]
) -> None:
    machines = [config(moves.path, f"disk-{n}-", kinds[n % 2]) for n in range(4)]
    fill(machines[0], 7)
    here = moves.running(machines[0], "block", *capabilities)
    for left, machine in pairwise(machines):
        there, address = moves.waiting(machine, "block", *capabilities)
        before = here.console.wait_beat()
        with writing(here):
            moved(here, there, address)
        disks = here.control.query()["disk"]
        assert disks["total"] == sum(SIZES)
        assert disks["remaining"] == 0
        assert disks["transferred"] > sum(SIZES)  # something was written meanwhile
        assert not any(image.active for image in here.machine.images)
        there.control.stop()
        for image in there.machine.images:
            image.inactivate()
        assert contents(left)[1] == contents(machine)[1]
        there.control.cont()
        assert there.console.wait_beat().time > before.time
        there.console.check()
        here = there
    here.control.stop()
    for image in here.machine.images:
        image.inactivate()
    assert journal(machines[-1]) > 10


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("capabilities", [(), ("zero-blocks",)])
def test_sparse_images_stay_sparse(moves: Moves, kind: str, capabilities: tuple[str, ...]) -> None:
    sizes = (MIB, 128 * MIB)
    left, machine = (config(moves.path, name, kind, sizes) for name in ("left", "right"))
    fill(left, 3)
    with open_image(left.disk[1].file, active=True, format=kind) as image:
        image.write_zeroes(32 * MIB, image.size - 32 * MIB)
    here = moves.running(left, "block", *capabilities)
    here.control.set_parameters({"max-bandwidth": 0})
    there, address = moves.waiting(machine, "block", *capabilities)
    moved(here, there, address)
    there.control.stop()
    for image in there.machine.images:
        image.inactivate()
    assert contents(left)[1] == contents(machine)[1]
    taken = [Path(m.disk[1].file).stat().st_blocks * 512 for m in (left, machine)]
    assert taken[1] < taken[0] + 4 * MIB
    wire = here.control.query()["ram"]["downtime-bytes"]
    assert wire < 64 * MIB


def overlay(path: Path, name: str) -> MachineConfig:
    """Above a backing file that all share, with noise in it; its end is within a chunk."""
    machine = config(path, name, "qcow2")
    base = path / "base.qcow2"
    if not base.exists():
        command = ["qemu-img", "create", "-q", "-f", "qcow2", str(base), str(SIZES[1])]
        subprocess.run(command, check=True)
        with open_image(base, active=True, format="qcow2") as image:
            image.write(0, random.Random(2).randbytes(8 * MIB))  # noqa: S311
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2"]
    subprocess.run([*command, machine.disk[1].file], check=True)
    return machine


def test_only_what_lies_above_a_backing_file_is_sent(moves: Moves) -> None:
    left, machine = (overlay(moves.path, name) for name in ("left", "right"))
    with open_image(left.disk[1].file, active=True, format="qcow2") as image:
        image.write(5 * MIB + 512, b"above" * 1000)
        image.write_zeroes(2 * MIB, 65536)
    here = moves.running(left, "block", "zero-blocks")
    here.control.set_parameters({"block-incremental": True})
    there, address = moves.waiting(machine, "block")
    assert "needs the parameter block-incremental here as well" in refused(here, there, address)
    there, address = moves.waiting(machine, "block", incremental=True)
    moved(here, there, address)
    there.control.stop()
    for image in there.machine.images:
        image.inactivate()
    assert contents(left)[1] == contents(machine)[1]
    with open_image(machine.disk[1].file, active=True, format="qcow2") as image:
        own = [(extent.offset // MIB, extent.length) for extent in image.allocated(own=True)]
    assert {chunk for chunk, _ in own} == {2, 5}
    assert sum(length for _, length in own) < 3 * MIB


def goes_on(here: Host) -> None:
    """The machine runs where it was, and so do its disks."""
    assert here.machine.running
    assert all(image.active for image in here.machine.images)
    here.console.wait_beat()
    here.console.wait_beat()
    here.console.check()


def refused(here: Host, there: Host, address: str) -> str:
    """Why the machine stays at its source; the other side has let go of its images."""
    here.control.migrate(address)
    assert here.control.wait(LONG) is Status.FAILED
    assert there.control.wait(LONG) is Status.FAILED
    assert not any(image.active for image in there.machine.images)
    goes_on(here)
    return str(here.control.error)


def test_images_are_filled_only_where_both_sides_want_it(moves: Moves) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    here = moves.running(left)
    there, address = moves.waiting(machine, "block")
    assert "has not sent its disks: turn block on there" in refused(here, there, address)
    here.control.set_capabilities({"block": True})
    there, address = moves.waiting(machine)
    assert "the source sends its disks: turn block on here" in refused(here, there, address)
    assert not any(contents(machine)[0])


@pytest.mark.parametrize("size", [4 * MIB, 9 * MIB, 10 * MIB, 10 * MIB + 512])
def test_images_of_other_sizes_are_refused(moves: Moves, size: int) -> None:
    left = config(moves.path, "left")
    machine = config(moves.path, "right", sizes=(SIZES[0], size))
    here = moves.running(left, "block")
    there, address = moves.waiting(machine, "block")
    refused(here, there, address)


def test_image_that_the_source_has_after_all_is_not_written(moves: Moves) -> None:
    """Both sides name the same image, and say that it is not shared."""
    machine = config(moves.path, "shared")
    here = moves.running(machine, "block")
    there, address = moves.waiting(machine, "block")
    assert "another process has the image" in refused(here, there, address)
    here.control.stop()
    for image in here.machine.images:
        image.inactivate()
    assert journal(machine) > 0


def test_machine_with_a_record_of_its_owner_takes_its_disks_along(moves: Moves) -> None:
    record = OwnershipConfig(store=f"file:{moves.path}/owner")
    left, machine = (replace(config(moves.path, n), ownership=record) for n in ("left", "right"))
    fill(left, 5)
    here = moves.running(left, "block")
    there, address = moves.waiting(machine, "block")
    moved(here, there, address)
    assert here.control.query()["x-vmferry-ownership"] == "gone"
    there.console.wait_beat()
    there.control.stop()
    for image in there.machine.images:
        image.inactivate()
    assert contents(left)[1] == contents(machine)[1]


def test_record_beside_an_image_does_not_go_with_it(moves: Moves) -> None:
    """The other side would look for it beside an image of its own, when all has been sent."""
    left, machine = (replace(config(moves.path, n), ownership=None) for n in ("left", "right"))
    here = moves.running(left, "block")
    with pytest.raises(UsageError, match="cannot be beside one"):
        here.control.migrate(f"unix:{moves.path}/nobody")
    goes_on(here)
    with pytest.raises(UsageError, match="cannot be beside one"):
        moves.waiting(machine, "block")


def test_image_that_cannot_be_written_is_refused(moves: Moves) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    disks = (machine.disk[0], replace(machine.disk[1], read_only=True))
    here = moves.running(left, "block")
    there, address = moves.waiting(replace(machine, disk=disks), "block")
    reason = refused(here, there, address)
    assert "right1.raw" in reason
    assert "read-only" in reason


def test_image_that_is_cut_at_the_source_fails_the_migration(moves: Moves) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    fill(left, 1)
    here = moves.running(left, "block")
    there, address = moves.waiting(machine, "block")
    with Path(left.disk[1].file).open("r+b") as file:
        file.truncate(4 * MIB)
    reason = refused(here, there, address)
    assert "left1.raw" in reason
    assert "cut while it was open" in reason


@pytest.mark.parametrize("side", ["left", "right"])
def test_storage_daemon_that_dies_fails_the_migration(moves: Moves, side: str) -> None:
    """The disk of the other side is raw; the source's guest does not use the disk that is lost."""
    kinds = ("qcow2", "raw") if side == "left" else ("raw", "qcow2")
    left, machine = config(moves.path, "left", kinds[0]), config(moves.path, "right", kinds[1])
    fill(left, 1)
    here = moves.running(left, "block")
    here.control.set_parameters({"max-bandwidth": 2 * MIB})
    there, address = moves.waiting(machine, "block")
    here.control.migrate(address)
    name = f"{side}1.qcow2"
    wait_until(lambda: daemon_of(name) is not None, LONG)
    daemon = daemon_of(name)
    assert daemon is not None
    os.kill(daemon, signal.SIGKILL)
    assert here.control.wait(LONG) is Status.FAILED
    assert there.control.wait(LONG) is Status.FAILED
    assert name in str(here.control.error)
    assert here.machine.running
    here.console.wait_beat()
    lost = (here if side == "left" else there).machine.images[1]
    with suppress(StorageError):  # the migration has said so before
        lost.close()


def daemon_of(name: str) -> int | None:
    """The process of this one that has an image open."""
    for pid in children(os.getpid()):
        with suppress(OSError):  # it has ended meanwhile
            if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def test_cancelled_while_disks_are_copied(moves: Moves) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    fill(left, 1)
    here = moves.running(left, "block")
    here.control.set_parameters({"max-bandwidth": MIB})
    there, address = moves.waiting(machine, "block")
    here.control.migrate(address)
    wait_until(lambda: any(image.active for image in there.machine.images), LONG)
    here.control.cancel()
    assert here.control.wait(LONG) is Status.CANCELLED
    assert there.control.wait(LONG) is Status.FAILED
    assert not any(image.active for image in there.machine.images)
    goes_on(here)
    here.control.set_parameters({"max-bandwidth": 0})
    there, address = moves.waiting(machine, "block")
    moved(here, there, address)
    there.console.wait_beat()


def test_machine_that_arrives_stopped_can_leave_its_disks_alone(moves: Moves) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    here = moves.running(left, "block")
    here.control.stop()
    there, address = moves.waiting(machine, "block", "late-block-activate")
    moved(here, there, address)
    assert not any(image.active for image in there.machine.images)
    there.control.cont()
    there.console.wait_beat()


def test_sections_without_a_chunk_come_first(tmp_path: Path) -> None:
    """As those of a QEMU, which reads ahead: nothing is there to be flushed."""
    disk = config(tmp_path, "disk", sizes=(MIB,)).disk[0]
    with open_image(disk.file, active=False) as image:
        disks = IncomingDisks([image])
        for _ in range(20):
            disks.flush()
            time.sleep(0.005)  # it would fail in a thread of its own
        disks.take(DiskChunk("disk0", 0, b"data" * (MIB // 4)))
        disks.finish()
        assert image.active
    assert Path(disk.file).read_bytes() == b"data" * (MIB // 4)


def test_device_that_fails_at_the_source_fails_the_migration(moves: Moves) -> None:
    """A loop device whose file was cut: the kernel says EIO for what is behind."""
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    fill(left, 1)
    backing = Path(left.disk[1].file)
    with block_device(backing) as device:
        second = replace(left.disk[1], file=device, direct=True)
        here = moves.running(replace(left, disk=(left.disk[0], second)), "block")
        there, address = moves.waiting(machine, "block")
        os.truncate(backing, 4 * MIB)
        assert f"{device}: cannot be read: Input/output error" in refused(here, there, address)
        os.truncate(backing, SIZES[1])
        there, address = moves.waiting(machine, "block")
        moved(here, there, address)


@pytest.mark.parametrize(("number", "words"), [(5, "Input/output error"), (28, "No space left")])
def test_storage_that_fails_at_the_destination_fails_the_migration(
    moves: Moves, number: int, words: str
) -> None:
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    fill(left, 1)
    fault = {"event": "none", "iotype": "write", "errno": number, "once": True}
    file = {"driver": "file", "filename": machine.disk[1].file}
    drive = {"driver": "blkdebug", "inject-error": [fault], "image": file}
    options = "json:" + json.dumps({"driver": "raw", "file": drive})
    with nbd_server(options, at=moves.path / "s") as uri:
        second = replace(machine.disk[1], file=uri)
        here = moves.running(left, "block")
        there, address = moves.waiting(replace(machine, disk=(machine.disk[0], second)), "block")
        reason = refused(here, there, address)
        assert f"{uri}: cannot be written: {words}" in reason


FULL = """
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from tests.migration.test_own_disks import *
target = Path(sys.argv[1])
with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
    moves = Moves(Path(directory), stack)
    left, machine = (config(moves.path, name) for name in ("left", "right"))
    fill(left, 1)
    with target.open("wb") as file:
        file.truncate(SIZES[1])
    disks = (machine.disk[0], replace(machine.disk[1], file=str(target)))
    here = moves.running(left, "block")
    there, address = moves.waiting(replace(machine, disk=disks), "block")
    print(refused(here, there, address))
"""


def test_full_disk_leaves_the_machine_to_its_source(tmp_path: Path) -> None:
    reason = on_small_file_system(tmp_path, FULL)
    assert f"{tmp_path}/disk: cannot be written: No space left on device" in reason
