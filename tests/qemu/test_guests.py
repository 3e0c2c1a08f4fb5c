"""The guest itself: it starts in every way, sees its own damage, and survives a migration."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guests import GuestError, Serial, check_ram, walker
from guests.walker import MAGIC
from vmferry.machines.listing import assemble
from vmferry.qemu import QemuProcess

Start = Callable[..., QemuProcess]

MIB = 1 << 20
PC = ("-machine", "pc", "-nodefaults", "-m", "8200k")  # see Scenario.ram_size


def memory(vm: QemuProcess, size: int = 8 * MIB) -> np.ndarray:
    vm.save_memory(vm.directory / "memory", 0, size)
    return np.fromfile(vm.directory / "memory", dtype=np.uint8)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(walker(pages=256).ljust(MIB, b"\0"))
    return path


def test_listing_resolves_labels_both_ways() -> None:
    listing = """
    start:
        eb {end.r}       ; jmp end
        e8 {start.R}     ; call start
        68 {value.d} {end.w}
    end:
    """
    code = assemble(listing, origin=0x100, parameters={"value": -2})
    assert code == bytes.fromhex("eb 0c e8 f9ffffff 68 feffffff 0e01")


def test_listing_refuses_what_is_no_code() -> None:
    with pytest.raises(ValueError, match="found 'nop'"):
        assemble("nop", origin=0, parameters={})


@pytest.mark.parametrize(
    "wrong",
    [
        {"pages": 0},
        {"pages": 4, "hot": 5},
        {"pages": 1, "start": 100},
        {"pages": 1, "start": 0},
        {"pages": 1 << 20},
        {"pages": 1, "fill": -1},
    ],
)
def test_walk_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="walk"):
        walker(**wrong)


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("machine", "disk"),
    [
        (("-machine", "pc"), None),
        (("-machine", "pc"), "if=ide"),
        (("-machine", "pc"), "if=floppy"),
        (("-machine", "pc"), "if=virtio"),
        (("-machine", "q35"), None),
        (("-machine", "q35"), "if=ide"),
        (("-machine", "microvm"), None),
    ],
)
def test_guest_starts_in_every_way(
    start_qemu: Start, image: Path, machine: tuple[str, ...], disk: str | None
) -> None:
    how = ("-drive", f"{disk},format=raw,file={image}") if disk else ("-kernel", str(image))
    vm = start_qemu(*machine, "-nodefaults", "-m", "8", *how)
    serial = Serial(vm.serial)
    serial.wait_ready()
    assert serial.wait_beat(after=serial.wait_beat()) > 1


@pytest.mark.qemu
def test_memory_is_right_at_any_instant(start_qemu: Start, tmp_path: Path) -> None:
    guest = {"pages": 300, "hot": 200, "fill": 1024, "delay": 2000}
    (tmp_path / "guest").write_bytes(walker(**guest))
    vm = start_qemu(*PC, "-kernel", str(tmp_path / "guest"))
    Serial(vm.serial).wait_beat()
    for _ in range(5):
        vm.execute("stop")
        ram = memory(vm)
        assert check_ram(ram, **guest) == []
        vm.execute("cont")
    for offset in (0, 199 * 4096 + 4092, 250 * 4096 + 12, 3 * 4096 + 100, 900 * 4096 + 4):
        damaged = ram.copy()
        damaged[MIB + offset] ^= 1
        [problem] = check_ram(damaged, **guest)
        assert problem.startswith(f"page {offset // 4096} at {MIB + offset // 4096 * 4096:#x}")
    lost = ram.copy()
    lost[MIB + 5 * 4096 : MIB + 6 * 4096] = 0
    assert check_ram(lost, **guest)[0].startswith("page 5 at 0x105000: expected the stamp")
    assert len(check_ram(ram[: 2 * MIB], **guest)) == 1


@pytest.mark.qemu
def test_guest_reports_a_page_changed_behind_its_back(start_qemu: Start, image: Path) -> None:
    source = start_qemu(*PC, "-kernel", str(image))
    Serial(source.serial).wait_beat()
    saved = source.directory / "saved"
    source.migrate(f"exec:cat > {saved}")
    source.wait_migration()
    stream = bytearray(saved.read_bytes())
    stamp = stream.rindex(struct.pack("<II", MAGIC, 7))
    stream[stamp + 8] ^= 0x80
    saved.write_bytes(stream)
    destination = start_qemu(*PC, "-kernel", str(image), "-incoming", f"exec:cat {saved}")
    with pytest.raises(GuestError, match="page 7 of the walk holds"):
        Serial(destination.serial).wait_beat()


@pytest.mark.qemu
def test_guest_goes_on_counting_after_a_migration(start_qemu: Start, image: Path) -> None:
    source = start_qemu(*PC, "-kernel", str(image))
    destination = start_qemu(*PC, "-kernel", str(image), "-incoming", "defer")
    before, after = Serial(source.serial), Serial(destination.serial)
    before.wait_beat()
    uri = f"unix:{destination.directory / 'migration'}"
    destination.incoming(uri)
    source.migrate(uri)
    source.wait_migration()
    assert after.wait_beat(after=before.drain()) > before.counter
    assert "R" not in after.lines
    destination.execute("stop")
    assert check_ram(memory(destination), pages=256) == []


def test_silent_guest_is_an_error_with_its_last_words() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"R\nC 0000")
        serial = Serial(ours)
        serial.wait_ready()
        with pytest.raises(GuestError, match="last words: R"):
            serial.wait_beat(timeout=0.02)
        theirs.sendall(b"001A\nE 00000003 00000001 00000002\n")
        with pytest.raises(GuestError, match="page 3 of the walk holds 0x1, not 0x2"):
            serial.wait_beat()
        assert serial.counter == 0x1A
