"""Exports against the real QEMU: the same memory at the same addresses, the same registers."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guests import Serial, walker
from tests.checkpoint.elf import Load, part, read_core
from tests.checkpoint.long_mode import BASES, GENERAL, HIGH, KERNEL_GS, MARK, long_mode
from vmferry import Checkpoint, receive
from vmferry.checkpoint.export import Layout, convert, layout_of
from vmferry.qemu import QemuProcess

pytestmark = pytest.mark.qemu

Start = Callable[..., QemuProcess]

MIB = 1 << 20
FOUR_GIB = 1 << 32
VGA_WINDOW = (0xA0000, 0xC0000)
VIDEO_MEMORY = (0xE0000000, 0xFEC00000)
BARE = ("-nodefaults", "-vga", "none")

_LINE = re.compile(r" +([0-9a-f]+)-([0-9a-f]+) \(prio \d+, (?:ram|rom|romd)\): (\S+)(?: @(\w+))?")

Row = tuple[int, int, str, int]


def seen(vm: QemuProcess) -> list[Row]:
    """Memory as QEMU's CPUs see it: start, end, block and offset, neighbours joined."""
    views = vm.hmp("info mtree -f").split("FlatView #")
    (view,) = (view for view in views if 'AS "memory"' in view)
    found: list[Row] = []
    for line in view.splitlines():
        if match := _LINE.match(line):
            first, last, block, offset = match.groups()
            row = (int(first, 16), int(last, 16) + 1, block, int(offset or "0", 16))
            start, end, name, at = found[-1] if found else (0, 0, "", 0)
            if (end, name, at + end - start) == (row[0], row[2], row[3]):
                found[-1] = (start, row[1], name, at)
            else:
                found.append(row)
    return found


def rows(layout: Layout) -> list[Row]:
    return [(s.address, s.end, s.block.name, s.offset) for s in layout.segments]


def save(vm: QemuProcess, directory: Path) -> Path:
    """The machine in a checkpoint; it stands still, so it is the same there and in QEMU."""
    vm.migrate(f"exec:cat > {vm.directory}/stream")
    vm.wait_migration()
    receive(f"file:{vm.directory}/stream", directory / "checkpoint").close()
    return directory / "checkpoint"


def memory(vm: QemuProcess, start: int, size: int) -> bytes:
    path = vm.directory / "memory"
    vm.save_memory(path, start, size)
    return path.read_bytes()


def same_pages(found: bytes, expected: bytes, start: int = 0) -> None:
    """Whether both are the same; if not, the address of each page that differs."""
    assert len(found) == len(expected)
    one, other = (np.frombuffer(data, np.uint8).reshape(-1, 4096) for data in (found, expected))
    different = np.flatnonzero((one != other).any(axis=1)) * 4096 + start
    assert not different.size, [hex(address) for address in different[:20]]


def kernel_file(directory: Path, image: bytes) -> str:
    path = directory / "guest"
    path.write_bytes(image)
    return str(path)


@pytest.mark.parametrize(
    ("machine", "size"),
    [
        ("pc", "2816M"),
        ("pc", "3583M"),
        ("pc", "3584M"),
        ("pc", "6G"),
        ("q35", "2815M"),
        ("q35", "2816M"),
        ("q35", "6G"),
        ("microvm", "3G"),
        ("microvm", "3073M"),
        ("pc,max-ram-below-4g=64M", "128M"),
        ("pc,max-ram-below-4g=4G", "3968M"),
        ("pc,max-ram-below-4g=4G", "4G"),
        ("q35,max-ram-below-4g=1G", "3G"),
        ("pc-i440fx-2.4", "4G"),
        ("pc-q35-2.4", "4G"),
    ],
)
def test_layout_is_that_of_qemu(machine: str, size: str, start_qemu: Start, tmp_path: Path) -> None:
    vm = start_qemu("-S", *BARE, "-machine", machine, "-m", size)
    expected = seen(vm)
    with Checkpoint(save(vm, tmp_path)) as checkpoint:
        assert rows(layout_of(checkpoint)) == expected


@pytest.mark.parametrize(
    "more",
    [
        ("-machine", "q35,memory-backend=m", "-object", "memory-backend-ram,id=m,size=64M"),
        (
            "-machine",
            "pc-i440fx-3.1,memory-backend=m",
            "-object",
            "memory-backend-memfd,id=m,size=64M",
        ),
        ("-machine", "pc", "-device", "isa-vga"),
    ],
)
def test_main_memory_is_found_by_whatever_name(
    more: tuple[str, ...], start_qemu: Start, tmp_path: Path
) -> None:
    vm = start_qemu("-S", *BARE, "-m", "64", *more)
    expected = [row for row in seen(vm) if not row[2].startswith("vga.")]
    with Checkpoint(save(vm, tmp_path)) as checkpoint:
        found = rows(layout_of(checkpoint))
    assert found[-1] == expected[-1]
    assert max(row[1] for row in found[:-1]) == max(row[1] for row in expected[:-1]) == 64 * MIB


def test_rom_before_the_first_instruction_is_that_of_qemu(
    start_qemu: Start, tmp_path: Path
) -> None:
    vm = start_qemu("-S", *BARE, "-machine", "pc", "-m", "64")
    low, high = memory(vm, 0, MIB), memory(vm, FOUR_GIB - MIB, MIB)
    convert(save(vm, tmp_path), "raw", tmp_path / "raw")
    same_pages(part(tmp_path / "raw", 0, MIB), low)
    same_pages(part(tmp_path / "raw", FOUR_GIB - 256 * 1024, MIB), high[-256 * 1024 :])
    assert any(low[0xF0000:])


def test_flash_is_where_qemu_has_it(start_qemu: Start, tmp_path: Path) -> None:
    drives = []
    for number, size in enumerate((MIB, 512 * 1024)):
        flash = tmp_path / f"flash{number}"
        flash.write_bytes(np.random.default_rng(number).bytes(size))
        drives += ["-drive", f"if=pflash,format=raw,file={flash}"]
    vm = start_qemu("-S", *BARE, "-machine", "q35", "-m", "64", *drives)
    low, high = memory(vm, 0, MIB), memory(vm, FOUR_GIB - 1536 * 1024, 1536 * 1024)
    convert(save(vm, tmp_path), "raw", tmp_path / "raw")
    same_pages(part(tmp_path / "raw", 0, MIB), low)
    same_pages(part(tmp_path / "raw", FOUR_GIB - 1536 * 1024, 1536 * 1024), high)


@pytest.mark.parametrize(
    ("machine", "kernel", "ends"),
    [
        (("-machine", "pc"), "walker", (64 * MIB, FOUR_GIB)),
        (("-machine", "q35"), "walker", (64 * MIB, FOUR_GIB)),
        (("-machine", "microvm"), "walker", (64 * MIB, FOUR_GIB)),
        (
            ("-machine", "pc,max-ram-below-4g=32M", "-smp", "2", *BARE),
            "long mode",
            (32 * MIB, FOUR_GIB + 32 * MIB),
        ),
    ],
)
def test_memory_of_a_guest_is_that_of_qemu_page_by_page(
    machine: tuple[str, ...],
    kernel: str,
    ends: tuple[int, int],
    start_qemu: Start,
    tmp_path: Path,
) -> None:
    image = walker(pages=512) if kernel == "walker" else long_mode()
    vm = start_qemu(*machine, "-m", "64", "-kernel", kernel_file(tmp_path, image))
    Serial(vm.serial).wait_ready()
    vm.execute("stop")
    # Behind the VGA window QEMU reads the registers of the card.
    ranges = [(0, VGA_WINDOW[0]), (VGA_WINDOW[1], ends[0]), (FOUR_GIB - 64 * 1024, ends[1])]
    expected = {start: memory(vm, start, end - start) for start, end in ranges}
    dump = tmp_path / "dump"
    vm.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{dump}"})
    checkpoint = save(vm, tmp_path)
    raw, core = tmp_path / "raw", tmp_path / "core"
    convert(checkpoint, "raw", raw)
    convert(checkpoint, "elf-core", core)
    assert raw.stat().st_size == ends[1]
    for start, data in expected.items():
        same_pages(part(raw, start, len(data)), data, start)
    theirs, ours = read_core(dump), read_core(core)
    assert ours.machine == theirs.machine
    assert ours.notes == theirs.notes
    for load in ours.loads:
        assert any(piece.address <= load.address < piece.end for piece in theirs.loads)
        same_piece(core, load, raw)
    for load in theirs.loads:
        if not VIDEO_MEMORY[0] <= load.address < VIDEO_MEMORY[1]:
            same_piece(dump, load, raw)


def same_piece(core: Path, load: Load, raw: Path) -> None:
    found, expected = part(core, load.offset, load.size), part(raw, load.address, load.size)
    same_pages(found, expected, load.address)


@pytest.fixture
def standing(start_qemu: Start, tmp_path: Path) -> QemuProcess:
    """A guest of 64 bits with two CPUs and memory above 4 GiB, standing still."""
    kernel = kernel_file(tmp_path, long_mode())
    vm = start_qemu(*BARE, "-machine", "pc", "-m", "5G", "-smp", "2", "-kernel", kernel)
    Serial(vm.serial).wait_ready()
    vm.execute("stop")
    return vm


def data_in(path: Path) -> list[tuple[int, int]]:
    """Start and size of each stretch of *path* that is no hole."""
    found = []
    size = path.stat().st_size
    with path.open("rb") as file:
        end = 0
        while end < size:
            try:
                start = file.seek(end, os.SEEK_DATA)
            except OSError:
                break
            end = file.seek(start, os.SEEK_HOLE)
            found.append((start, end - start))
    return found


def test_data_of_a_large_guest_is_that_of_qemu_and_the_rest_is_holes(
    standing: QemuProcess, tmp_path: Path
) -> None:
    checkpoint = save(standing, tmp_path)
    raw, core = tmp_path / "raw", tmp_path / "core"
    convert(checkpoint, "raw", raw)
    convert(checkpoint, "elf-core", core)
    assert raw.stat().st_size == 6 << 30
    assert part(raw, HIGH, 8) == MARK.to_bytes(8, "little")
    data = data_in(raw)
    for start, size in data:
        same_pages(part(raw, start, size), memory(standing, start, size), start)
    pages = sum(size for _, size in data) // 4096
    with Checkpoint(checkpoint) as opened:
        sent = {entry.name: entry.data_pages for entry in opened.manifest.ram}
    assert 0 < pages <= sent["pc.ram"] + sent["pc.bios"]
    loads = read_core(core).loads
    assert [(load.address, load.end) for load in loads] == [
        (0, 3 << 30),
        (FOUR_GIB - 256 * 1024, FOUR_GIB),
        (FOUR_GIB, 6 << 30),
    ]
    headers = loads[0].offset
    assert sum(size for _, size in data_in(core)) == headers + pages * 4096


def test_registers_are_those_that_qemu_shows(standing: QemuProcess, tmp_path: Path) -> None:
    standing.execute("human-monitor-command", {"command-line": "cpu 0"})
    shown = {
        name: int(value, 16)
        for name, value in re.findall(
            r"\b([A-Z0-9]+) *=([0-9a-f]+)", standing.hmp("info registers")
        )
    }
    bases = dict(re.findall(r"\b([FG]S) =[0-9a-f]+ ([0-9a-f]+)", standing.hmp("info registers")))
    convert(save(standing, tmp_path), "elf-core", tmp_path / "core")
    notes = read_core(tmp_path / "core").notes
    assert [name for name, _, _ in notes] == [b"CORE\0"] * 2 + [b"QEMU\0"] * 2
    names = "R15 R14 R13 R12 RBP RBX R11 R10 R9 R8 RAX RCX RDX RSI RDI - RIP CS RFL RSP SS"
    found = dict(zip(names.split(), struct.unpack_from("<21Q", notes[0][2], 112), strict=True))
    assert found.pop("-") == 0
    assert found == {name: shown[name] for name in found}
    assert {name: found[name.upper()] for name in GENERAL} == GENERAL
    fs_gs = struct.unpack_from("<2Q", notes[0][2], 112 + 21 * 8)
    assert fs_gs == (BASES["fs"], BASES["gs"]) == tuple(int(bases[n], 16) for n in ("FS", "GS"))
    control = struct.unpack_from("<6Q", notes[2][2], 392)
    assert control == (shown["CR0"], 0, shown["CR2"], shown["CR3"], shown["CR4"], KERNEL_GS)


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_gdb_sees_what_qemu_shows(standing: QemuProcess, tmp_path: Path) -> None:
    convert(save(standing, tmp_path), "elf-core", tmp_path / "core")
    show = ["thread 1", "p/x $r15", "p/x $fs_base", f"x/gx {HIGH:#x}", "info threads"]
    command = [argument for line in show for argument in ("-ex", line)]
    done = subprocess.run(
        ["gdb", "-batch", "-nx", "-core", str(tmp_path / "core"), *command],
        capture_output=True,
        text=True,
        check=True,
    )
    for expected in (GENERAL["r15"], BASES["fs"], MARK):
        assert f"{expected:#x}" in done.stdout
    assert "LWP 2" in done.stdout
