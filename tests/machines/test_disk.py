"""The disk of a machine, driven by a guest that means no good."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.transports.support import wait_until
from vmferry.errors import StorageError
from vmferry.images import open_image
from vmferry.machines import DiskConfig, GuestConfig, MachineConfig, create
from vmferry.machines.devices.disk import DISCARD, DONE, FAILED, FLUSH, READ, WRITE, Disk

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
        place = RING + self.head % 4 * 32
        self.ram.bytes[place : place + 32] = struct.pack("<IIQQQ", kind, 0, offset, address, length)
        self.head += 1
        self.disk.write(24, 4, self.head & 0xFFFFFFFF)
        self.disk.write(28, 4, self.head >> 32)
        wait_until(lambda: self.disk.read(32, 8) == self.head, LONG)
        return int.from_bytes(self.ram.bytes[place + 4 : place + 8], "little")


@pytest.fixture
def failures() -> list[StorageError]:
    return []


@pytest.fixture
def driver(tmp_path: Path, failures: list[StorageError]) -> Iterator[Driver]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    ram = Ram()
    with open_image(path, active=True) as image:
        disk = Disk(image, ram, failures.append, SIZE, 0)
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
    assert driver.disk.read(32, 8) == 0


@pytest.mark.parametrize(("ring", "entries"), [((1 << 64) - 16, 4), (RAM, 4), (RING, 3), (RING, 0)])
def test_ring_that_cannot_be(driver: Driver, ring: int, entries: int) -> None:
    driver.disk.entries = 0
    driver.disk.write(8, 8, ring)
    driver.disk.write(16, 8, entries)
    driver.disk.write(24, 8, 1)
    driver.disk.stop()
    assert driver.disk.read(32, 8) == 0


def test_write_that_fails_is_told_and_done_again(
    driver: Driver, failures: list[StorageError], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        assert driver.disk.read(32, 8) == 0
        assert "RuntimeError" in str(failures[0])
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
