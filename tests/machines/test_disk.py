"""The disk of a machine, driven by a guest that means no good."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.support import block_device, nbd_server
from tests.transports.support import wait_until
from vmferry.errors import ImageLocked, StorageError
from vmferry.images import open_image
from vmferry.machines import DiskConfig, GuestConfig, IoError, MachineConfig, OnError, create
from vmferry.machines.devices.disk import (
    DISCARD,
    DONE,
    FAILED,
    FLUSH,
    READ,
    WRITE,
    Action,
    Disk,
    IoStatus,
)

SIZE = 64 << 10
RAM = 1 << 16
RING = 0x1000
LONG = 20.0


class Ram:
    def __init__(self) -> None:
        self.bytes = bytearray(RAM)

    def at(self, address: int, length: int) -> memoryview | None:
        if address + length > RAM:
            return None
        return memoryview(self.bytes)[address : address + length]


class Driver:
    """Puts requests into the ring of a disk, and waits for what becomes of them."""

    def __init__(self, disk: Disk, ram: Ram) -> None:
        self.disk, self.ram = disk, ram
        self.head = 0
        disk.write(8, 8, RING)
        disk.write(16, 8, 4)
        disk.start()

    def request(self, kind: int, offset: int, address: int, length: int) -> int:
        place = self.ask(kind, offset, address, length)
        wait_until(lambda: self.disk.read(32, 8) == self.head, LONG)
        return int.from_bytes(self.ram.bytes[place + 4 : place + 8], "little")

    def ask(self, kind: int, offset: int, address: int, length: int) -> int:
        """Put a request into the ring; where it is."""
        place = RING + self.head % 4 * 32
        self.ram.bytes[place : place + 32] = struct.pack("<IIQQQ", kind, 0, offset, address, length)
        self.head += 1
        self.disk.write(24, 4, self.head & 0xFFFFFFFF)
        self.disk.write(28, 4, self.head >> 32)
        return place


@pytest.fixture
def failures() -> list[IoError]:
    return []


@pytest.fixture
def driver(tmp_path: Path, failures: list[IoError]) -> Iterator[Driver]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with driven(str(path), failures) as driver:
        yield driver


@contextlib.contextmanager
def driven(where: str, failures: list[IoError], *, direct: bool = False) -> Iterator[Driver]:
    """The driver of a disk on the image *where*."""
    ram = Ram()
    with open_image(where, active=True, direct=direct) as image:
        disk = Disk(image, ram, failures.append, image.size, 0)
        yield Driver(disk, ram)
        disk.close()


def test_what_is_written_is_read(driver: Driver) -> None:
    driver.ram.bytes[0x4000:0x4400] = b"data" * 256
    assert driver.request(WRITE, 512, 0x4000, 1024) == DONE
    assert driver.request(FLUSH, 0, 0, 0) == DONE
    assert driver.request(READ, 512, 0x8000, 1024) == DONE
    assert driver.ram.bytes[0x8000:0x8400] == b"data" * 256
    assert driver.request(DISCARD, 512, 0, 1024) == DONE


@pytest.mark.parametrize("kind", [READ, WRITE, DISCARD, 4, 0xFFFFFFFF])
@pytest.mark.parametrize(
    ("offset", "address", "length"),
    [
        (SIZE, 0x4000, 512),
        (SIZE - 512, 0x4000, 1024),
        (1 << 63, 0x4000, 512),
        (0, 0x4000, 0),
        (0, 0x4000, 511),
        (1, 0x4000, 512),
        (0, 0x4000, 1 << 40),
        (0, 0x4000, (1 << 64) - 512),
    ],
)
def test_requests_that_make_no_sense_fail(
    driver: Driver, kind: int, offset: int, address: int, length: int
) -> None:
    assert driver.request(kind, offset, address, length) == FAILED
    assert not any(Path(driver.disk.image.name).read_bytes())


@pytest.mark.parametrize("address", [RAM, RAM - 256, (1 << 64) - 512])
def test_data_that_is_not_in_memory(driver: Driver, address: int) -> None:
    for kind in (READ, WRITE):
        assert driver.request(kind, 0, address, 512) == FAILED


@pytest.mark.parametrize("head", [5, 1 << 63, (1 << 64) - 1])
def test_more_requests_than_the_ring_holds_are_none(driver: Driver, head: int) -> None:
    driver.disk.write(24, 8, head)
    driver.disk.stop()
    driver.disk.drain()
    assert driver.disk.read(32, 8) == 0


@pytest.mark.parametrize(("ring", "entries"), [((1 << 64) - 16, 4), (RAM, 4), (RING, 3), (RING, 0)])
def test_ring_that_cannot_be(driver: Driver, ring: int, entries: int) -> None:
    driver.disk.entries = 0
    driver.disk.write(8, 8, ring)
    driver.disk.write(16, 8, entries)
    driver.disk.write(24, 8, 1)
    driver.disk.stop()
    driver.disk.drain()
    assert driver.disk.read(32, 8) == 0


@contextlib.contextmanager
def failing(directory: Path, iotype: str, number: int) -> Iterator[str]:
    """An image on the server of QEMU, whose driver ``blkdebug`` fails it once with an errno."""
    path = directory / "disk"
    path.write_bytes(b"data" * (SIZE // 4))
    drive = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "inject-error": [{"event": "none", "iotype": iotype, "errno": number, "once": True}],
            "image": {"driver": "file", "filename": str(path)},
        },
    }
    arguments = ["--discard=unmap", "json:" + json.dumps(drive)]
    with nbd_server(*arguments, at=directory / "s") as uri:
        yield uri


EIO, ENOSPC = 5, 28


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("kind", "policy", "number", "action"),
    [
        (WRITE, OnError.REPORT, ENOSPC, Action.REPORT),
        (WRITE, OnError.IGNORE, EIO, Action.IGNORE),
        (WRITE, OnError.ENOSPC, EIO, Action.REPORT),
        (WRITE, OnError.ENOSPC, ENOSPC, Action.STOP),
        (WRITE, OnError.STOP, EIO, Action.STOP),
        (DISCARD, OnError.STOP, EIO, Action.STOP),
        (DISCARD, OnError.REPORT, EIO, Action.REPORT),
        (READ, OnError.REPORT, EIO, Action.REPORT),
        (READ, OnError.IGNORE, EIO, Action.IGNORE),
        (READ, OnError.STOP, EIO, Action.STOP),
    ],
)
def test_error_of_the_storage_is_treated_as_asked(
    tmp_path: Path,
    failures: list[IoError],
    kind: int,
    policy: OnError,
    number: int,
    action: Action,
) -> None:
    iotype = {WRITE: "write", READ: "read", DISCARD: "discard"}[kind]
    with failing(tmp_path, iotype, number) as uri, driven(uri, failures) as driver:
        disk = driver.disk
        setattr(disk, "rerror" if kind == READ else "werror", policy)
        assert driver.request(FLUSH, 0, 0, 0) == DONE
        if action is not Action.STOP:
            answer = driver.request(kind, 0, 0x4000, 4096)
            assert answer == (FAILED if action is Action.REPORT else DONE)
            assert disk.io_status is IoStatus.OK
        else:
            place = driver.ask(kind, 0, 0x4000, 4096)
            wait_until(lambda: disk.io_status is not IoStatus.OK, LONG)
            assert disk.io_status == ("nospace" if number == ENOSPC else "failed")
            driver.disk.write(24, 8, driver.head)  # the guest looks again: that is no new try
            disk.stop()
            disk.drain()
            assert disk.read(32, 8) == 1
            assert not any(driver.ram.bytes[place + 4 : place + 8])
            disk.start()
            wait_until(lambda: disk.read(32, 8) == driver.head, LONG)
            assert driver.ram.bytes[place + 4] == DONE
            assert disk.io_status is IoStatus.OK
        (failure,) = failures
        assert (failure.is_read, failure.action) == (kind == READ, action)
        assert uri in str(failure.error)
        assert failure.error.no_space is (number == ENOSPC)


def test_device_that_cannot_be_read_stops_the_machine(
    tmp_path: Path, failures: list[IoError]
) -> None:
    """A loop device whose file was cut: the kernel says EIO, until the file is as it was."""
    path = tmp_path / "disk"
    path.write_bytes(b"data" * (SIZE // 4))
    with block_device(path) as device, driven(device, failures, direct=True) as driver:
        driver.disk.rerror = OnError.STOP
        os.truncate(path, 0)
        driver.ask(READ, SIZE // 2, 0x4000, 4096)
        wait_until(lambda: driver.disk.io_status is IoStatus.FAILED, LONG)
        assert f"{device}: cannot be read: Input/output error" in str(failures[0].error)
        driver.disk.stop()
        driver.disk.drain()
        path.write_bytes(b"data" * (SIZE // 4))
        driver.disk.start()
        wait_until(lambda: driver.disk.read(32, 8) == 1, LONG)
        assert driver.ram.bytes[0x4000:0x5000] == b"data" * 1024


@pytest.mark.parametrize("kind", [READ, WRITE, FLUSH, DISCARD])
def test_inactive_image_stops_the_machine_whatever_is_asked_for(
    driver: Driver, failures: list[IoError], kind: int
) -> None:
    """The guest is not to go on here with what it is told of a disk that is elsewhere."""
    driver.disk.werror = driver.disk.rerror = OnError.REPORT
    driver.disk.image.inactivate()
    driver.ask(kind, 0, 0x4000, 512)
    wait_until(lambda: bool(failures), LONG)
    assert failures[0].action is Action.STOP
    driver.disk.stop()
    driver.disk.drain()
    assert driver.disk.read(32, 8) == 0


def test_write_that_fails_is_told_and_done_again(
    driver: Driver, failures: list[IoError], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.disk.werror = OnError.STOP
    done = threading.Event()

    def fail(*_: object, **__: object) -> None:
        done.set()
        raise RuntimeError("stands for anything")

    with monkeypatch.context() as broken:
        broken.setattr(driver.disk.image, "write", fail)
        place = RING
        driver.ram.bytes[place : place + 32] = struct.pack("<IIQQQ", WRITE, 0, 0, 0x4000, 512)
        driver.disk.write(24, 8, 1)
        assert done.wait(LONG)
        driver.disk.stop()
        driver.disk.drain()
        assert driver.disk.read(32, 8) == 0
        assert "RuntimeError" in str(failures[0].error)
    driver.disk.start()
    wait_until(lambda: driver.disk.read(32, 8) == 1, LONG)


def test_image_that_changed_its_size_meanwhile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    config = MachineConfig(
        ram=4 << 20,
        guest=GuestConfig(working_set=64 << 10),
        disk=(DiskConfig(file=str(path)),),
    )
    with create(config, serial=lambda _: None) as machine:
        machine.images[0].inactivate()
        with path.open("r+b") as file:
            file.truncate(2 * SIZE)
        machine.images[0].activate()
        with pytest.raises(StorageError, match="made larger or smaller"):
            machine.start()


def test_machines_share_an_image_where_all_of_them_say_so(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    guest = GuestConfig(working_set=64 << 10)

    def machine(*, share_rw: bool) -> MachineConfig:
        disk = DiskConfig(file=str(path), share_rw=share_rw)
        return MachineConfig(ram=4 << 20, guest=guest, disk=(disk,))

    with create(machine(share_rw=True), serial=lambda _: None):
        create(machine(share_rw=True), serial=lambda _: None).close()
        with pytest.raises(ImageLocked, match="write"):
            create(machine(share_rw=False), serial=lambda _: None)
