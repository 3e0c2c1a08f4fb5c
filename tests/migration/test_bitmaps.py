"""Dirty bitmaps of hosted machines: kept as QEMU keeps them, and sent and taken as it does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from tests.images.support import make, qemu_img
from tests.migration.python_machine import PythonMachine
from tests.migration.test_disks import LONG, config
from tests.qemu.hosts import HELD, Hosts
from tests.transports.support import background
from vmferry import Registry
from vmferry.errors import StreamError, UsageError
from vmferry.images import Image, open_image
from vmferry.machines import DiskConfig, MachineConfig
from vmferry.machines.config import OwnershipConfig
from vmferry.migration.bitmaps import DirtyBitmaps, IncomingBitmaps
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.qemu import QemuProcess
from vmferry.qemu.qmp import QmpError
from vmferry.transports import listen
from vmferry.wire.bitmap import BitmapBits, BitmapRecord, BitmapStart
from vmferry.wire.layout import BitmapFlag
from vmferry.wire.reader import StreamReader

SIZE = (3 << 20) + 1536
"""Ends within a granule."""

GRANULES = {"b512": 512, "b4k": 4096, "off": 65536, "b64k": 65536}
NAMES = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME

Start = Callable[..., QemuProcess]


def never() -> bool:
    return False


def two_disks(path: Path) -> MachineConfig:
    """A machine with a journal, and a disk that its guest does not use."""
    machine = config(path)
    second = DiskConfig(file=str(make(path / "second", "raw", SIZE)))
    disks = (*machine.disk, second)
    return replace(machine, disk=disks, ownership=OwnershipConfig(store="none"))


def add_all(execute: Callable[[str, dict[str, Any]], object], node: str = "disk1") -> None:
    for name, granularity in GRANULES.items():
        arguments = {"node": node, "name": name, "granularity": granularity}
        execute("block-dirty-bitmap-add", arguments | {"disabled": name == "off"})


WRITES = ((0, 512), (100_000, 70_000), (1 << 20, 1 << 20), (SIZE - 512, 512))


def bitmaps_of(execute: Callable[[str], Any], node: str = "disk1") -> list[dict[str, Any]]:
    """What ``query-block`` shows."""
    (disk,) = (disk for disk in execute("query-block") if disk["device"] == node)
    return sorted(disk["inserted"].get("dirty-bitmaps", []), key=itemgetter("name"))


def write(image: Image) -> None:
    for offset, length in WRITES:
        image.write(offset, bytes(length))


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def hosts(stack: ExitStack, tmp_path: Path) -> Hosts:
    return Hosts(stack, tmp_path)


def qemu_writes(qemu: QemuProcess) -> None:
    for offset, length in WRITES:
        assert "rror" not in qemu.hmp(f'qemu-io disk1 "write -q {offset} {length}"')


@pytest.fixture
def qemu(start_qemu: Start, tmp_path: Path) -> QemuProcess:
    """A QEMU with a disk ``disk1``, and a RAM block as the machine of these tests has."""
    make(tmp_path / "qemu", "raw", SIZE)
    return start_qemu(
        *("-machine", "pc-i440fx-7.2,memory-backend=ram", "-nodefaults", "-m", "4M"),
        *("-object", "memory-backend-ram,id=ram,size=4M", "-S", "-incoming", "defer"),
        *("-drive", f"if=none,id=disk1,format=raw,file={tmp_path}/qemu"),
        *("-device", "virtio-blk,drive=disk1"),
    )


@pytest.mark.qemu
def test_bitmaps_are_kept_as_qemu_keeps_them(
    hosts: Hosts, start_qemu: Start, tmp_path: Path
) -> None:
    make(tmp_path / "qemu", "raw", SIZE)
    drive = f"if=none,id=disk1,format=raw,file={tmp_path}/qemu"
    other = start_qemu("-S", "-drive", drive, "-device", "virtio-blk,drive=disk1")
    host, qmp = hosts.start(two_disks(tmp_path))

    def alike() -> list[dict[str, Any]]:
        ours, theirs = bitmaps_of(qmp.execute), bitmaps_of(other.execute)
        assert ours == theirs
        return ours

    def both(command: str, name: str) -> None:
        for execute in (qmp.execute, other.execute):
            execute(f"block-dirty-bitmap-{command}", {"node": "disk1", "name": name})

    assert alike() == []
    add_all(qmp.execute)
    add_all(other.execute)
    alike()
    write(host.machine.images[1])
    qemu_writes(other)
    assert [bitmap["count"] > 0 for bitmap in alike()] == [True, True, True, False]
    both("enable", "off")
    both("disable", "b4k")
    both("clear", "b512")
    host.machine.images[1].write(0, bytes(512))
    other.hmp('qemu-io disk1 "write 0 512"')
    assert [bitmap["count"] for bitmap in alike()][1::2] == [512, 65536]
    both("remove", "b64k")
    assert len(alike()) == 3
    for arguments in (
        {"node": "disk7", "name": "new"},
        {"node": "disk1", "name": "b4k"},
        {"node": "disk1", "name": ""},
        {"node": "disk1", "name": "new", "granularity": 256},
        {"node": "disk1", "name": "new", "granularity": 1000},
        {"node": "disk1", "name": "new", "persistent": True},  # a raw image cannot
    ):
        for execute in (qmp.execute, other.execute):
            with pytest.raises(QmpError):
                execute("block-dirty-bitmap-add", arguments)
    for execute in (qmp.execute, other.execute):
        with pytest.raises(QmpError):
            execute("block-dirty-bitmap-remove", {"node": "disk1", "name": "b64k"})
    alike()


def test_bitmaps_go_with_the_machine(hosts: Hosts, tmp_path: Path) -> None:
    machine = two_disks(tmp_path)
    here, qmp = hosts.start(machine)
    there, other = hosts.start(machine, incoming=hosts.uri())
    add_all(qmp.execute)
    qmp.execute("block-dirty-bitmap-add", {"node": "disk0", "name": "journal"})
    write(here.machine.images[1])
    here.console.wait_beat()
    here.console.wait_beat()
    here.control.set_capabilities({"dirty-bitmaps": True})
    here.control.set_parameters(HELD)
    here.control.migrate(str(there.address))
    assert all(bitmap["busy"] for bitmap in bitmaps_of(qmp.execute))
    with pytest.raises(QmpError, match="cannot be changed while they are migrated"):
        qmp.execute("block-dirty-bitmap-clear", {"node": "disk1", "name": "b4k"})
    before = max(bitmap["count"] for bitmap in bitmaps_of(qmp.execute))
    here.machine.images[1].write(2 << 20, bytes(500_000))  # after the bitmaps were announced
    here.control.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
    assert here.control.wait(LONG) is Status.COMPLETED, here.control.error
    assert there.control.wait(LONG) is Status.COMPLETED
    left = bitmaps_of(qmp.execute)
    assert bitmaps_of(other.execute) == left
    assert [bitmap["count"] > before for bitmap in left] == [True, True, True, False]
    assert bitmaps_of(other.execute, "disk0")[0]["count"] == 65536
    there.machine.images[1].write(600_000, bytes(512))  # and it goes on there
    more = [
        now["count"] - one["count"]
        for now, one in zip(bitmaps_of(other.execute), left, strict=True)
    ]
    assert more == [4096, 1024, 65536, 0]
    there.console.wait_beat()
    there.console.check()


def test_without_the_capability_they_stay(hosts: Hosts, tmp_path: Path) -> None:
    machine = two_disks(tmp_path)
    here, qmp = hosts.start(machine)
    there, other = hosts.start(machine, incoming=hosts.uri())
    add_all(qmp.execute)
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.COMPLETED
    assert there.control.wait(LONG) is Status.COMPLETED
    assert bitmaps_of(other.execute) == []
    assert len(bitmaps_of(qmp.execute)) == 4


def test_they_do_not_go_with_postcopy(hosts: Hosts, tmp_path: Path) -> None:
    here, _ = hosts.start(two_disks(tmp_path))
    here.control.set_capabilities({"dirty-bitmaps": True, "postcopy-ram": True})
    with pytest.raises(UsageError, match="postcopy-ram cannot be on with dirty-bitmaps"):
        here.control.migrate(f"unix:{tmp_path}/nobody")


def test_bitmap_that_is_there_already_is_refused(hosts: Hosts, tmp_path: Path) -> None:
    machine = two_disks(tmp_path)
    here, qmp = hosts.start(machine)
    there, other = hosts.start(machine, incoming=hosts.uri())
    for execute in (qmp.execute, other.execute):
        execute("block-dirty-bitmap-add", {"node": "disk1", "name": "mine"})
    here.control.set_capabilities({"dirty-bitmaps": True})
    here.control.migrate(str(there.address))
    assert here.control.wait(LONG) is Status.FAILED
    assert "disk1 has a bitmap" in str(here.control.error)
    assert here.machine.running
    here.console.wait_beat()


@pytest.mark.qemu
def test_qemu_takes_them(qemu: QemuProcess, stack: ExitStack, tmp_path: Path) -> None:
    """A machine without devices, so that QEMU takes it."""
    machine = stack.enter_context(PythonMachine(1024, name="pc-i440fx-7.2"))
    machine.registry = Registry()
    images = [make(tmp_path / name, "raw", SIZE) for name in ("disk0", "disk1")]
    machine.images = [stack.enter_context(open_image(image, active=True)) for image in images]
    control = Control(machine)
    stack.callback(control.close)
    for name, granularity in GRANULES.items():
        control.bitmaps.add("disk1", name, granularity=granularity, disabled=name == "off")
    write(machine.images[1])
    counts = {bitmap.name: bitmap.count for bitmap in control.bitmaps}
    qemu.incoming(f"unix:{tmp_path}/socket", capabilities=["dirty-bitmaps"])
    control.set_capabilities({"dirty-bitmaps": True})
    control.migrate(f"unix:{tmp_path}/socket")
    assert control.wait(LONG) is Status.COMPLETED, (control.error, qemu.stderr())
    found = bitmaps_of(qemu.execute)
    assert {bitmap["name"]: bitmap["count"] for bitmap in found} == counts
    assert {bitmap["name"]: bitmap["granularity"] for bitmap in found} == GRANULES
    assert [bitmap["recording"] for bitmap in found] == [True, True, True, False]


@pytest.mark.qemu
def test_those_of_qemu_are_taken(start_qemu: Start, stack: ExitStack, tmp_path: Path) -> None:
    """What it sends, read as a destination reads it; its devices are left aside."""
    make(tmp_path / "qemu", "raw", SIZE)
    drive = f"if=none,id=disk1,format=raw,file={tmp_path}/qemu"
    qemu = start_qemu("-nodefaults", "-S", "-drive", drive, "-device", "virtio-blk,drive=disk1")
    add_all(qemu.execute)
    qemu_writes(qemu)
    listener = stack.enter_context(listen(f"unix:{tmp_path}/socket"))
    sent = background(lambda: received(listener))
    qemu.migrate(listener.address, capabilities=["dirty-bitmaps"])
    records = sent.result(LONG)
    images = [make(tmp_path / name, "raw", SIZE) for name in ("disk0", "disk1")]
    bitmaps = DirtyBitmaps(
        [stack.enter_context(open_image(image, active=True)) for image in images], never
    )
    incoming = IncomingBitmaps(bitmaps)
    for record in records:
        incoming.take(record)
    incoming.finish()
    found = {one.name: (one.granularity, one.count, one.log.records) for one in bitmaps}
    assert found == {
        one["name"]: (one["granularity"], one["count"], one["recording"])
        for one in bitmaps_of(qemu.execute)
    }
    again = [record for one in bitmaps for record in (one.start(), *one.bits())]
    assert content(again) == content(records)


def content(records: list[BitmapRecord]) -> object:
    """What is said, whatever the order and however often the names are."""
    return sorted(
        (one.name, type(one).__name__, getattr(one, "first", 0), getattr(one, "data", None) or b"")
        for one in records
    )


def received(listener: Any) -> list[BitmapRecord]:
    with listener.accept() as channel:
        reader = StreamReader()
        found: list[BitmapRecord] = []
        while not reader.finished:
            reader.buffer.received(channel.recv_into(reader.buffer.room(), LONG))
            found += (event for event in reader.events() if isinstance(event, BitmapRecord))
        return found


@pytest.fixture
def bitmaps(stack: ExitStack, tmp_path: Path) -> DirtyBitmaps:
    image = stack.enter_context(open_image(make(tmp_path / "disk", "raw", SIZE), active=True))
    return DirtyBitmaps([image], never)


def begin(name: str = "b", granularity: int = 65536, **options: Any) -> BitmapStart:
    return BitmapStart("disk0", name, NAMES, granularity, enabled=True, persistent=False, **options)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([replace(begin(), node="disk1")], "there is no disk"),
        ([replace(begin(), persistent=True)], "a persistent one"),
        ([begin(name="x\n")], "printable"),
        ([begin()], "only some"),
        ([begin(), BitmapBits("disk0", "b", NAMES, 0, 8192, None)], "those up to byte"),
        ([begin(), BitmapBits("disk0", "b", NAMES, 1 << 53, 128, None)], "those up to byte"),
    ],
)
def test_what_cannot_be_is_refused(
    bitmaps: DirtyBitmaps, records: list[BitmapRecord], words: str
) -> None:
    incoming = IncomingBitmaps(bitmaps)

    def take() -> None:
        for record in records:
            incoming.take(record)
        incoming.finish()

    with pytest.raises(StreamError, match=words):
        take()
    assert list(bitmaps) == []


def test_memory_of_bitmaps_is_bounded(stack: ExitStack, tmp_path: Path) -> None:
    large = tmp_path / "large"
    qemu_img("create", "-q", "-f", "raw", str(large), "24G")
    bitmaps = DirtyBitmaps([stack.enter_context(open_image(large, active=False))], never)
    incoming = IncomingBitmaps(bitmaps)
    incoming.take(begin("first", 512))
    with pytest.raises(StreamError, match="no room"):
        incoming.take(begin("second", 1024))
    bitmaps.add("disk0", "first", granularity=512)
    with pytest.raises(UsageError, match="no room"):
        bitmaps.add("disk0", "second", granularity=1024)


def test_marks_that_come_meanwhile_are_kept(bitmaps: DirtyBitmaps, tmp_path: Path) -> None:
    """A bitmap is cleared and looked at while its disk is written."""
    bitmaps.add("disk0", "b", granularity=512)
    (bitmap,) = bitmaps
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            bitmap.log.marks()

    looking = background(look)
    for number in range(2000):
        bitmap.log.note(number * 512, 512)
    done.set()
    looking.result(LONG)
    assert bitmap.count == 2000 * 512
