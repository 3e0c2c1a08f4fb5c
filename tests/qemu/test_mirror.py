"""Disks that are copied while a machine moves between two real QEMUs."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guests import Serial, walker
from tests.cli.command import Running, vmferry
from tests.interop.lab import wait_until
from vmferry.errors import PeerError, Refused, VmferryError
from vmferry.qemu import Migration, QemuProcess
from vmferry.qemu.mirror import StorageCopy

pytestmark = pytest.mark.qemu

SIZE = 8 << 20
Start = Callable[..., QemuProcess]


@pytest.fixture
def machine(start_qemu: Start, tmp_path: Path) -> Callable[..., QemuProcess]:
    """Starts a QEMU with two disks of its own, under a name."""
    program = tmp_path / "guest"
    program.write_bytes(walker(pages=256, hot=16, fill=256))

    def start(name: str, *more: str, size: int = SIZE) -> QemuProcess:
        arguments = ["-machine", "pc", "-nodefaults", "-m", "16392k", "-kernel", str(program)]
        for number, kind in enumerate(("raw", "qcow2")):
            image = tmp_path / f"{name}{number}.{kind}"
            command = ["qemu-img", "create", "-q", "-f", kind, str(image), str(size)]
            subprocess.run(command, check=True)
            drive = f"if=none,id=disk{number},format={kind},file={image}"
            arguments += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]
        monitor = f"unix:{tmp_path}/{name}.qmp,server=on,wait=off"
        return start_qemu(*arguments, "-qmp", monitor, *more)

    return start


def write(qemu: QemuProcess, disk: int, pattern: int, offset: int, length: int) -> None:
    """As the machine would, through its own block layer."""
    output = qemu.hmp(f'qemu-io disk{disk} "write -q -P {pattern} {offset} {length}"')
    assert "error" not in output.lower(), output


@contextmanager
def writing(qemu: QemuProcess) -> Iterator[None]:
    """All the time, until the machine is stopped for the switchover."""
    done = threading.Event()

    def work() -> None:
        number = 0
        while not done.is_set():
            if not qemu.execute("query-status")["running"]:
                return
            write(qemu, number % 2, 1 + number % 250, (number * 37 % 128) << 16, 4096)
            number += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def same(path: Path) -> None:
    for number, kind in enumerate(("raw", "qcow2")):
        images = [str(path / f"{name}{number}.{kind}") for name in ("here", "there")]
        subprocess.run(["qemu-img", "compare", "-q", "-f", kind, "-F", kind, *images], check=True)
        if kind != "raw":
            subprocess.run(["qemu-img", "check", "-q", images[1]], check=True)


def left_behind(qemu: QemuProcess) -> tuple[int, int, list[str]]:
    """Jobs, exports and nodes that are not the machine's own."""
    nodes = [n["node-name"] for n in qemu.execute("query-named-block-nodes")]
    return (
        len(qemu.execute("query-jobs")),
        len(qemu.execute("query-block-exports")),
        [name for name in nodes if name.startswith("vmferry")],
    )


NOTHING = (0, 0, [])


def test_disks_and_machine_arrive_together(
    machine: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    here, there = machine("here"), machine("there", "-incoming", "defer")
    serial = Serial(here.serial)
    serial.wait_beat()
    for disk in range(2):
        write(here, disk, 0x5A, 0, 2 << 20)
    uri = f"unix:{tmp_path}/channel"
    there.incoming(uri)
    with writing(here), StorageCopy(here.qmp, there.qmp, f"unix:{tmp_path}/nbd") as copy:
        assert copy.names == ["disk0", "disk1"]
        copy.wait_ready()
        migration = Migration(here.qmp)
        migration.begin(uri, before_switchover=copy.finish)
        assert migration.wait(lambda _: None).status == "completed"
    there.wait_running()
    assert left_behind(here) == left_behind(there) == NOTHING
    write(there, 0, 0x77, 1 << 20, 512)  # they are the destination's, and can be written
    there.execute("stop")
    write(there, 0, 0x5A, 1 << 20, 512)
    after = serial.drain()
    assert Serial(there.serial).wait_beat() > after
    there.stop()
    here.stop()
    same(tmp_path)


def test_interrupted_command_leaves_nothing_behind(
    machine: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    uri = f"unix:{tmp_path}/channel"
    here = machine("here")
    machine("there", "-incoming", uri)  # it ends with the migration that it waits for
    Serial(here.serial).wait_beat()
    with Running(
        *("migrate", f"{tmp_path}/here.qmp", uri, "--copy-storage", "--json"),
        *("--destination-qmp", f"{tmp_path}/there.qmp"),
        *("--parameter", "max-bandwidth=1MiB/s", "--parameter", "downtime-limit=1ms"),
    ) as command:
        command.wait_for('"progress"')
        command.send_signal(signal.SIGINT)
        assert command.finish() == 130
    here.wait_running()
    wait_until(lambda: left_behind(here) == NOTHING)


def test_command_copies_and_moves(machine: Callable[..., QemuProcess], tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/channel"
    here, there = machine("here"), machine("there", "-incoming", uri)
    Serial(here.serial).wait_beat()
    for disk in range(2):
        write(here, disk, 0x33, 1 << 20, 3 << 20)
    done = vmferry(
        *("migrate", f"{tmp_path}/here.qmp", uri, "--copy-storage"),
        *("--destination-qmp", f"{tmp_path}/there.qmp"),
    )
    assert done.returncode == 0, done.stderr
    there.wait_running()
    there.execute("stop")
    there.stop()
    here.stop()
    same(tmp_path)


def test_disks_that_do_not_match_are_refused_before_anything_changes(
    machine: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    here, there = machine("here"), machine("there", "-incoming", "defer", size=2 * SIZE)
    with pytest.raises(Refused, match='"disk0" has 8 MiB here and 16 MiB'):
        StorageCopy(here.qmp, there.qmp, f"unix:{tmp_path}/nbd")
    assert left_behind(here) == left_behind(there) == NOTHING


def test_destination_that_dies_leaves_the_source_with_its_disks(
    machine: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    here, there = machine("here"), machine("there", "-incoming", "defer")
    Serial(here.serial).wait_beat()
    there.incoming(f"unix:{tmp_path}/channel")

    def copy() -> None:
        with StorageCopy(here.qmp, there.qmp, f"unix:{tmp_path}/nbd") as copy:
            copy.wait_ready()
            os.kill(there.pid, signal.SIGKILL)
            migration = Migration(here.qmp)
            migration.begin(
                f"unix:{tmp_path}/channel",
                parameters={"max-bandwidth": "1MiB/s", "downtime-limit": "1ms"},
                before_switchover=copy.finish,
            )
            migration.wait(lambda _: copy.look() and None)

    with pytest.raises(VmferryError):
        copy()
    here.wait_running()
    wait_until(lambda: left_behind(here) == NOTHING)
    write(here, 1, 0x11, 0, 512)


@pytest.mark.parametrize(("number", "words"), [(5, "Input/output error"), (28, "No space left")])
def test_storage_that_fails_at_the_destination_is_told_by_the_name_of_its_disk(
    machine: Callable[..., QemuProcess], start_qemu: Start, tmp_path: Path, number: int, words: str
) -> None:
    here = machine("here")
    Serial(here.serial).wait_beat()
    faults = tmp_path / "faults"
    faults.write_text(f'[inject-error]\nevent = "pwritev"\nerrno = "{number}"\n')
    arguments = ["-machine", "pc", "-nodefaults", "-m", "16392k", "-incoming", "defer"]
    for disk, file in enumerate((f"blkdebug:{faults}:{tmp_path}/there0", f"{tmp_path}/there1")):
        with Path(file.rpartition(":")[2]).open("wb") as image:
            image.truncate(SIZE)
        drive = f"if=none,id=disk{disk},format=raw,file={file}"
        arguments += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{disk}"]
    there = start_qemu(*arguments)
    write(here, 0, 0x5A, 0, 2 << 20)
    with (
        pytest.raises(PeerError, match=f"disk0.*{words}"),
        StorageCopy(here.qmp, there.qmp, f"unix:{tmp_path}/nbd") as copy,
    ):
        copy.wait_ready()
    assert left_behind(here) == left_behind(there) == NOTHING
    assert here.execute("query-status")["running"]


def test_mirror_that_fails_is_told_by_the_name_of_its_disk(
    machine: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    here, there = machine("here"), machine("there", "-incoming", "defer")
    Serial(here.serial).wait_beat()
    with StorageCopy(here.qmp, there.qmp, f"unix:{tmp_path}/nbd") as copy:
        copy.wait_ready()
        os.kill(there.pid, signal.SIGKILL)

        def failed() -> bool:
            write(here, 0, 0x21, 0, 512)
            try:
                copy.look()
            except PeerError as error:
                return "disk0" in str(error)
            return False

        wait_until(failed)
    assert left_behind(here) == NOTHING
    assert here.execute("query-status")["running"]
