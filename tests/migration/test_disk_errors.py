"""A disk whose storage fails: what the guest, the operator and a migration see of it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.images.support import nbd_server, on_small_file_system
from tests.migration.test_disks import LONG, config, journal
from tests.qemu.hosts import HELD, PATIENCE, Hosts
from tests.transports.support import wait_until
from vmferry.machines import MachineConfig, OnError
from vmferry.machines.config import OwnershipConfig
from vmferry.migration.status import Status
from vmferry.qemu import QemuProcess, Qmp
from vmferry.qemu.hosting import Host

pytestmark = pytest.mark.qemu


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def hosts(stack: ExitStack, tmp_path: Path) -> Hosts:
    return Hosts(stack, tmp_path)


def alone(machine: MachineConfig, **disk: Any) -> MachineConfig:
    """The machine without a record of its owner, and with another first disk."""
    disks = (replace(machine.disk[0], **disk), *machine.disk[1:])
    return replace(machine, disk=disks, ownership=OwnershipConfig(store="none"))


ROOM = 8 << 20
"""So much is on the disk, and more than is on its file system."""

FULL = """
import sys
from pathlib import Path
from tests.migration.test_disk_errors import on_a_full_disk
on_a_full_disk(Path(sys.argv[1]))
print("done")
"""


def on_a_full_disk(place: Path) -> None:
    """Migrate a machine whose disk, beside *place*, gets full meanwhile."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        hosts = Hosts(stack, Path(directory))
        machine = alone(config(place.parent))
        with Path(machine.disk[0].file).open("r+b") as file:
            file.truncate(ROOM)
        here, qmp = hosts.start(machine)
        there, other = hosts.start(machine, incoming=hosts.uri())
        here.console.wait_filled()
        here.control.set_parameters(HELD)
        here.control.migrate(str(there.address))
        wait_until(lambda: here.control.query().get("ram", {}).get("dirty-sync-count", 0) > 1, LONG)
        with place.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        stopped_for_want_of_room(qmp, machine)
        qmp.execute("cont")
        stopped_for_want_of_room(qmp, machine)
        here.control.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
        assert here.control.wait(LONG) is Status.COMPLETED, here.control.error
        assert there.control.wait(LONG) is Status.COMPLETED, there.control.error
        assert (here.state, there.state) == ("postmigrate", "io-error")
        assert other.execute("query-block")[0]["io-status"] == "ok"  # nothing was tried there
        other.execute("cont")
        stopped_for_want_of_room(other, machine)
        place.unlink()
        other.execute("cont")
        there.console.wait_beat()
        there.console.wait_beat()
        other.execute("stop")
        assert there.state == "paused"
        there.console.check()
        there.machine.images[0].inactivate()
        assert journal(machine) > 0


def stopped_for_want_of_room(qmp: Qmp, machine: MachineConfig) -> None:
    """A write of the guest has failed, and it waits for somebody to make room."""
    failed = qmp.wait_event("BLOCK_IO_ERROR", timeout=LONG)["data"]
    reason = failed.pop("reason")
    assert reason.startswith(f"{machine.disk[0].file}: cannot be written: No space left on device")
    expected = {"device": "disk0", "operation": "write", "action": "stop", "nospace": True}
    assert failed == expected
    qmp.wait_event("STOP", timeout=LONG)
    assert qmp.execute("query-status")["status"] == "io-error"
    assert not qmp.execute("query-status")["running"]
    assert qmp.execute("query-block")[0]["io-status"] == "nospace"


def test_guest_waits_for_room_on_a_full_disk_wherever_it_is_moved(tmp_path: Path) -> None:
    assert on_small_file_system(tmp_path, FULL) == "done\n"


@contextlib.contextmanager
def failing(machine: MachineConfig, directory: Path, number: int) -> Iterator[str]:
    """The image of a machine behind a server of QEMU that does not do the first write."""
    drive = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "inject-error": [{"event": "pwritev", "errno": number, "once": True}],
            "image": {"driver": "file", "filename": machine.disk[0].file},
        },
    }
    with nbd_server("json:" + json.dumps(drive), at=directory / "s") as uri:
        yield uri


def begun(hosts: Hosts, machine: MachineConfig) -> tuple[Host, Qmp]:
    """A machine that begins when there is a session with its monitor: no event is missed."""
    host, qmp = hosts.start(machine, incoming="defer")
    host.machine.images[0].activate()
    host.machine.start()
    return host, qmp


def test_error_stays_where_the_migration_fails(
    hosts: Hosts, stack: ExitStack, tmp_path: Path
) -> None:
    machine = config(tmp_path)
    uri = stack.enter_context(failing(machine, tmp_path, 5))
    here, _ = hosts.start(alone(machine, file=uri, werror=OnError.STOP))
    wait_until(lambda: here.state == "io-error", LONG)
    other = replace(alone(machine, file=uri), ram=8 << 20)
    there, _ = hosts.start(other, incoming=hosts.uri())
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.FAILED
    assert here.state == "io-error"
    here.control.stop()  # it stands still already
    assert here.state == "io-error"
    here.control.cont()
    here.console.wait_beat()
    here.console.wait_beat()
    here.console.check()
    here.control.stop()
    assert here.state == "paused"


def test_error_that_is_no_want_of_room_is_told_to_the_guest(
    hosts: Hosts, stack: ExitStack, tmp_path: Path
) -> None:
    """By default, as QEMU does: the machine runs, and the guest finds its record wanting."""
    machine = config(tmp_path)
    uri = stack.enter_context(failing(machine, tmp_path, 5))
    host, qmp = begun(hosts, alone(machine, file=uri))
    failed = qmp.wait_event("BLOCK_IO_ERROR", timeout=LONG)["data"]
    assert (failed["action"], failed["nospace"]) == ("report", False)
    wait_until(lambda: bool(host.console.reports), LONG)
    assert "record 0 is unlike what was written to the disk" in str(host.console.reports[0])
    assert host.state != "io-error"
    assert qmp.execute("query-block")[0]["io-status"] == "ok"


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_image_that_vanished_is_not_let_go_of(
    hosts: Hosts, stack: ExitStack, tmp_path: Path, kind: str
) -> None:
    """The other side could not open it, and then nobody could."""
    machine = alone(config(tmp_path, kind))
    image = Path(machine.disk[0].file)
    here, _ = hosts.start(machine)
    there, _ = hosts.start(machine, incoming=hosts.uri())
    here.console.wait_filled()
    image.rename(tmp_path / "elsewhere")
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.FAILED
    assert f"{image}: the file was removed or replaced" in str(here.control.error)
    assert here.machine.running
    here.console.wait_beat()
    here.console.wait_beat()
    here.console.check()
    (tmp_path / "elsewhere").rename(image)
    again, _ = hosts.start(machine, incoming=hosts.uri())
    here.control.migrate(str(again.address))
    assert here.control.wait(LONG) is Status.COMPLETED
    assert again.control.wait(LONG) is Status.COMPLETED
    again.console.wait_beat()
    again.control.stop()
    again.console.check()
    again.machine.images[0].inactivate()
    assert journal(machine) > 0


Start = Callable[..., QemuProcess]


def shape(value: object) -> object:
    """The keys of an object and the types of their values."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return type(value)


def test_disks_are_shown_in_the_shape_of_qemu(tmp_path: Path) -> None:
    machine = config(tmp_path)
    file = machine.disk[0].file
    drive = f"if=none,id=disk0,format=raw,file={file}"
    device = ("-device", "virtio-blk,drive=disk0")
    for werror in ("report", "stop"):
        with QemuProcess(("-S", "-drive", f"{drive},werror={werror}", *device)) as qemu:
            (theirs,) = (b for b in qemu.execute("query-block") if b["device"] == "disk0")
        with ExitStack() as stack:
            _, qmp = Hosts(stack, tmp_path).start(alone(machine, werror=OnError(werror)))
            (ours,) = qmp.execute("query-block")
        theirs.pop("qdev")  # what is left out is optional
        theirs["inserted"].pop("node-name")
        theirs["inserted"]["image"].pop("dirty-flag")
        sizes = [one["inserted"]["image"].pop("actual-size") for one in (ours, theirs)]
        assert list(map(type, sizes)) == [int, int]
        assert ours == theirs


def test_errors_are_told_in_the_shape_of_qemu(
    hosts: Hosts, stack: ExitStack, tmp_path: Path, start_qemu: Start
) -> None:
    """The firmware of a QEMU looks for a system on a disk that cannot be read."""
    machine = config(tmp_path)
    with Path(machine.disk[0].file).open("r+b") as file:
        file.truncate(1 << 20)  # the firmware wants a whole cylinder
    (tmp_path / "faults").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
    drive = f"blkdebug:{tmp_path}/faults:{machine.disk[0].file}"
    qemu = start_qemu(
        *("-drive", f"if=none,id=disk0,format=raw,rerror=stop,file={drive}"),
        *("-device", "virtio-blk,drive=disk0,bootindex=0"),
    )
    theirs = qemu.qmp.wait_event("BLOCK_IO_ERROR", timeout=PATIENCE)
    assert qemu.qmp.wait_event("STOP", timeout=PATIENCE)
    assert qemu.execute("query-status")["status"] == "io-error"
    qemu.stop()
    uri = stack.enter_context(failing(machine, tmp_path, 5))
    _, qmp = begun(hosts, alone(machine, file=uri, werror=OnError.STOP))
    ours = qmp.wait_event("BLOCK_IO_ERROR", timeout=PATIENCE)
    assert qmp.wait_event("STOP", timeout=PATIENCE)
    theirs["data"].pop("node-name")
    assert shape(ours) == shape(theirs)
