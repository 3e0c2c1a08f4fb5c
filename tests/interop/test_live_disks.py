"""Disks of a machine that runs, in the ``block`` section between vmferry and a real QEMU.

The machines are not of one kind, so each destination refuses the state of the devices; by then all
of the disks has come.  What is sent and what is read is what a migration makes and reads.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.python_machine import PythonMachine
from tests.migration.test_disks import LONG
from tests.migration.test_own_disks import MIB, Moves, config, fill, goes_on, writing
from tests.transports.support import wait_until
from vmferry.images import open_image
from vmferry.machines import MachineConfig
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.qemu import QemuProcess

pytestmark = pytest.mark.qemu

Start = Callable[..., QemuProcess]

SIZES = (2 * MIB, 9 * MIB)
"""QEMU takes no others: it writes the last chunk whole."""

KIND = "pc-i440fx-7.2"
KINDS = pytest.mark.parametrize("kinds", [("raw", "raw"), ("raw", "qcow2"), ("qcow2", "raw")])
ZEROES = pytest.mark.parametrize("more", [(), ("zero-blocks",)], ids=["whole", "zeroes"])


@pytest.fixture
def moves(tmp_path: Path) -> Iterator[Moves]:
    with ExitStack() as stack:
        yield Moves(tmp_path, stack)


def arguments(machine: MachineConfig) -> list[str]:
    """A QEMU with the disks and the memory of *machine*."""
    ram = f"memory-backend-ram,id=ram,size={machine.ram}"
    command = ["-machine", f"{KIND},memory-backend=ram", "-object", ram, "-m", f"{machine.ram}b"]
    command += ["-nodefaults"]
    for number, disk in enumerate(machine.disk):
        drive = f"if=none,id=disk{number},format={disk.format},file={disk.file}"
        command += ["-drive", drive, "-device", f"virtio-blk-pci,drive=disk{number}"]
    return command


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@ZEROES
def test_qemu_takes_the_disks_of_a_hosted_machine(
    moves: Moves, start_qemu: Start, kind: str, more: tuple[str, ...]
) -> None:
    """The end of a QEMU that refuses a machine leaves a qcow2 image unfinished: its own are raw."""
    left, right = config(moves.path, "left", kind, SIZES), config(moves.path, "right", sizes=SIZES)
    fill(left, 1)
    here = moves.running(left, "block", "pause-before-switchover", *more)
    here.machine.name = KIND  # type: ignore[misc]
    qemu = start_qemu(*arguments(right), "-incoming", "defer")
    qemu.incoming(f"unix:{moves.path}/socket", capabilities=["block"])
    with writing(here):
        here.control.migrate(f"unix:{moves.path}/socket")
        wait_until(lambda: here.control.status in {Status.PRE_SWITCHOVER, Status.FAILED}, LONG)
    assert here.control.status is Status.PRE_SWITCHOVER, f"{here.control.error} {qemu.stderr()}"
    sent = here.control.query()["disk"]
    assert sent["transferred"] > sum(image.size for image in here.machine.images)
    for image in here.machine.images:
        image.flush()
    expected = contents(left)
    here.control.proceed("pre-switchover")
    assert here.control.wait(LONG) is Status.FAILED
    assert qemu.wait_exit(LONG) != 0
    assert re.search("savevm section|device state|timer", qemu.stderr())
    assert contents(right) == expected
    assert expected[0].strip(b"\0")
    goes_on(here)


def contents(machine: MachineConfig) -> list[bytes]:
    """What a reader finds that asks for no lock, and not for an image that was closed well."""
    found = []
    for disk in machine.disk:
        raw = Path(disk.file).with_suffix(".content")
        command = ["qemu-img", "convert", "-U", "-f", disk.format, "-O", "raw", disk.file, str(raw)]
        subprocess.run(command, check=True)
        found.append(raw.read_bytes())
    return found


def blocks_of(qemu: QemuProcess) -> dict[str, int]:
    """The RAM blocks of a QEMU and the bytes of each that are in use."""
    lines = qemu.hmp("info ramblock").splitlines()[1:]
    found = (re.match(r" *(\S.*?) +\S+ Ki?B +0x\w+ +(0x\w+) ", line) for line in lines)
    return {match[1]: int(match[2], 16) for match in found if match}


def all_sent(qemu: QemuProcess) -> bool:
    """Whether it has sent as many bytes of its disks as there are; what is sent again counts."""
    info = qemu.query_migrate()
    disks = info.get("disk", {"transferred": -1, "total": 0})
    return info["status"] != "active" or disks["transferred"] >= disks["total"]


@KINDS
@ZEROES
def test_disks_of_a_running_qemu_are_taken(
    moves: Moves, start_qemu: Start, kinds: tuple[str, str], more: tuple[str, ...]
) -> None:
    left, right = config(moves.path, "left", kinds[0]), config(moves.path, "right", kinds[1])
    fill(left, 1)
    qemu = start_qemu(*arguments(left))
    with ExitStack() as stack:
        machine = stack.enter_context(PythonMachine(left.ram // 4096, name=KIND))
        for name, size in blocks_of(qemu).items():
            if name != "ram":
                machine.memory.add(name, size)
        machine.images = [
            stack.enter_context(open_image(disk.file, active=False, format=disk.format))
            for disk in right.disk
        ]
        there = Control(machine, awaited=True)
        stack.callback(there.close)
        there.set_capabilities({"block": True})
        qemu.migrate(
            there.incoming(f"unix:{moves.path}/socket"),
            capabilities=["block", "return-path", *more],
            parameters={"downtime-limit": 0, "max-bandwidth": 4 * MIB},
        )
        chance = random.Random(2)  # noqa: S311
        for number in range(16):
            offset = chance.randrange(machine.images[1].size // 4096) * 4096
            qemu.hmp(f'qemu-io disk1 "write -q -P {number + 1} {offset} 512"')
            qemu.hmp(f'qemu-io disk0 "write -q -P {number + 1} {number * 32768} 4096"')
        qemu.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        # Its bulk pass is whole only where no downtime is allowed meanwhile.
        wait_until(lambda: all_sent(qemu), LONG)
        qemu.execute("migrate-set-parameters", {"downtime-limit": 1000})
        assert there.wait(LONG) is Status.FAILED
        assert "section" in str(there.error)
        assert not any(image.active for image in machine.images)
    assert qemu.wait_migration("failed")
    qemu.stop()
    assert contents(right) == contents(left)
    assert b"\x10" * 4096 in contents(right)[0]
