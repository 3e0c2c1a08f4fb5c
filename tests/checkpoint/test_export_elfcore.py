"""Core files: laid out as tools expect them, with the registers of every CPU."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.elf import part, read_core
from tests.checkpoint.machines import MIB, PAGE, Device, Saved
from tests.support.recorded import recorded
from vmferry.checkpoint.export import convert
from vmferry.errors import StreamError, UsageError, VmferryError

EM_386 = 3
EM_X86_64 = 62
LONG_MODE = 1 << 14
FIRMWARE = 64 << 10

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no binutils here")

GENERAL = [0x1000 + number for number in range(16)]
TABLES = ("ldt", "tr", "gdt", "idt")


def numbers(*values: int, size: int = 8) -> bytes:
    return b"".join(value.to_bytes(size) for value in values)


def cpu(
    index: int = 0, *, long_mode: bool = True, leave: str = "", **instead: tuple[str, bytes]
) -> Device:
    """A CPU whose registers all differ; *leave* a field out, or have another type and value."""
    fields: list[tuple[str, str, bytes] | tuple[str, str, int, bytes]] = [
        ("env.regs", "uint64", 16, numbers(*(index << 32 | value for value in GENERAL))),
        ("env.eip", "uint64", numbers(0x2000 + index)),
        ("env.eflags", "uint64", numbers(0x202)),
        ("env.hflags", "uint32", numbers(LONG_MODE * long_mode, size=4)),
        *((f"env.cr[{number}]", "uint64", numbers(0x3000 + number)) for number in (0, 2, 3, 4)),
        ("env.kernelgsbase", "uint64", numbers(0x4000)),
    ]
    fields = [
        (name, *instead[name.removeprefix("env.")])
        if name.removeprefix("env.") in instead
        else (name, *rest)
        for name, *rest in fields
        if name != leave
    ]
    return SegmentedCpu(kind="cpu", instance=index, fields=fields)


class SegmentedCpu(Device):
    """A CPU with its segment registers, which are structs."""

    def described(self) -> dict[str, object]:
        described = super().described()
        names = [("env.segs", 6), *((f"env.{name}", None) for name in TABLES)]
        for name, count in names:
            entry = {"name": name, "type": "struct", "size": 20, "struct": SEGMENT}
            described["fields"].append(entry if count is None else entry | {"array_len": count})
        return described

    def encode(self, number: int) -> bytes:
        whole = super().encode(number)
        segments = b"".join(
            numbers(0x10 + place, size=4)
            + numbers(0x5000 + place)
            + numbers(0x6000 + place, 0x7000 + place, size=4)
            for place in range(10)
        )
        return whole[:-5] + segments + whole[-5:]


SEGMENT = {
    "vmsd_name": "segment",
    "version": 1,
    "fields": [
        {"name": name, "type": kind, "size": size}
        for name, kind, size in (
            ("selector", "uint32", 4),
            ("base", "uint64", 8),
            ("limit", "uint32", 4),
            ("flags", "uint32", 4),
        )
    ],
}


def core(tmp_path: Path, *devices: Device) -> Path:
    saved = Saved(
        blocks={"microvm.ram": 16 * MIB, "pc.bios": FIRMWARE},
        pages={("microvm.ram", 5 * PAGE): b"five", ("pc.bios", 0): b"firmware"},
        devices=devices,
    )
    saved.checkpoint(tmp_path).close()
    out = tmp_path / "core"
    convert(tmp_path / "checkpoint", "elf-core", out)
    return out


def test_memory_lies_at_its_physical_addresses(tmp_path: Path) -> None:
    path = core(tmp_path, cpu())
    found = read_core(path)
    assert [(load.address, load.size) for load in found.loads] == [
        (0, 0xF0000),
        (0xF0000, FIRMWARE),
        (0x100000, 15 * MIB),
        ((4 << 30) - FIRMWARE, FIRMWARE),
    ]
    assert all(load.offset % PAGE == 0 for load in found.loads)
    low, mirror, _, firmware = (part(path, load.offset, load.size) for load in found.loads)
    assert low[5 * PAGE :].rstrip(b"\0") == b"five"
    assert mirror == firmware == b"firmware".ljust(FIRMWARE, b"\0")
    assert path.stat().st_blocks * 512 <= 64 << 10


def test_every_cpu_has_both_notes(tmp_path: Path) -> None:
    found = read_core(core(tmp_path, cpu(0), cpu(1)))
    assert found.machine == EM_X86_64
    assert [(name, kind, len(data)) for name, kind, data in found.notes] == [
        (b"CORE\0", 1, 336),
        (b"CORE\0", 1, 336),
        (b"QEMU\0", 0, 440),
        (b"QEMU\0", 0, 440),
    ]
    second = 1 << 32
    (pid,) = struct.unpack_from("<I", found.notes[1][2], 32)
    registers = struct.unpack_from("<27Q", found.notes[1][2], 112)
    assert pid == 2
    order = (15, 14, 13, 12, 5, 3, 11, 10, 9, 8, 0, 1, 2, 6, 7)
    assert registers[:15] == tuple(second | GENERAL[number] for number in order)
    es, cs, ss, ds, fs, gs = range(0x10, 0x16)
    bases = (0x5004, 0x5005)
    assert registers[15:] == (
        *(0, 0x2001, cs, 0x202, second | GENERAL[4], ss, *bases, ds, es, fs, gs),
    )


def test_note_of_qemu_has_what_debuggers_of_kernels_need(tmp_path: Path) -> None:
    (_, _, data) = read_core(core(tmp_path, cpu())).notes[1]
    order = (0, 3, 1, 2, 6, 7, 4, 5, *range(8, 16))
    general = tuple(GENERAL[number] for number in order)
    assert struct.unpack_from("<II18Q", data) == (1, 440, *general, 0x2000, 0x202)
    places = (1, 3, 0, 4, 5, 2, 6, 7, 8, 9)  # cs, ds, es, fs, gs, ss, ldt, tr, gdt, idt
    assert [struct.unpack_from("<IIIIQ", data, 152 + 24 * i) for i in range(10)] == [
        (0x10 + place, 0x6000 + place, 0x7000 + place, 0, 0x5000 + place) for place in places
    ]
    assert struct.unpack_from("<6Q", data, 392) == (0x3000, 0, 0x3002, 0x3003, 0x3004, 0x4000)


def test_guest_of_32_bits_has_the_registers_of_the_i386(tmp_path: Path) -> None:
    found = read_core(core(tmp_path, cpu(1, long_mode=False)))
    assert found.machine == EM_386
    (_, _, data), _ = found.notes
    es, cs, ss, ds, fs, gs = range(0x10, 0x16)
    general = tuple(GENERAL[number] for number in (3, 1, 2, 6, 7, 5, 0))
    expected = (*general, ds, es, fs, gs, 0, 0x2001, cs, 0x202, GENERAL[4], ss)
    assert len(data) == 144
    assert struct.unpack_from("<I", data, 24) == (2,)
    assert struct.unpack_from("<17I", data, 72) == expected


def test_state_of_a_qemu_for_32_bits_is_read_too(tmp_path: Path) -> None:
    device = cpu(long_mode=False, leave="env.kernelgsbase")
    fields = [
        ("env.regs", "uint32", 8, numbers(*GENERAL[:8], size=4)),
        ("env.eip", "uint32", numbers(0x2000, size=4)),
        *device.fields[2:],
    ]
    narrow = SegmentedCpu(kind="cpu", fields=fields)
    *_, (_, _, data) = read_core(core(tmp_path, narrow)).notes
    general = tuple(GENERAL[number] for number in (0, 3, 1, 2, 6, 7, 4, 5))
    assert struct.unpack_from("<II18Q", data) == (1, 440, *general, *(0,) * 8, 0x2000, 0x202)
    assert struct.unpack_from("<6Q", data, 392)[5] == 0


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (cpu(leave="env.eip"), "expected env.eip, a number of at most 64 bits, found nothing"),
        (cpu(leave="env.kernelgsbase"), "expected env.kernelgsbase, a number"),
        (cpu(eip=("int64", numbers((1 << 64) - 1))), "expected env.eip, a number of at most 64"),
        (cpu(eip=("buffer", bytes(8))), "found 8 bytes of type buffer"),
        (cpu(regs=("uint64", numbers(1))), "expected the general registers, env.regs, found 8"),
        (cpu(regs=("buffer", bytes(128))), "expected the general registers"),
    ],
)
def test_cpu_whose_state_is_not_as_it_must_be_is_refused(
    device: Device, message: str, tmp_path: Path
) -> None:
    with pytest.raises(StreamError, match=message):
        core(tmp_path, device)
    assert not (tmp_path / "core").exists()


def test_machine_without_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no CPU"):
        core(tmp_path)


@given(position=st.integers(0, 4000), bit=st.integers(0, 7))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_damaged_description_is_an_error_of_ours_or_harmless(
    position: int, bit: int, tmp_path: Path
) -> None:
    stream = bytearray(Saved(devices=[cpu(), cpu(1)]).stream())
    start = stream.index(b'{"page_size"')
    stream[start + position % (len(stream) - start)] ^= 1 << bit
    (tmp_path / "damaged").write_bytes(stream)
    out = tmp_path / "core"
    out.unlink(missing_ok=True)
    try:
        convert(tmp_path / "damaged", "elf-core", out)
    except VmferryError:
        assert not out.exists()


@needs_readelf
def test_readelf_has_nothing_to_complain_of(tmp_path: Path) -> None:
    done = subprocess.run(
        ["readelf", "-a", "-W", core(tmp_path, cpu())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "NT_PRSTATUS" in done.stdout
    assert done.stdout.count("LOAD ") == 4


@needs_gdb
@pytest.mark.parametrize(
    ("long_mode", "shown"), [(True, "rip 0x2001 r15 0x10000100f"), (False, "eip 0x2001 esp 0x1004")]
)
def test_gdb_sees_memory_and_every_cpu(long_mode: bool, shown: str, tmp_path: Path) -> None:
    names = shown.split()[::2]
    path = core(tmp_path, cpu(0, long_mode=long_mode), cpu(1, long_mode=long_mode))
    show = " ".join(f"{name} %#lx" for name in names)
    done = subprocess.run(
        [
            *("gdb", "-batch", "-nx", "-core", path, "-ex", "thread 2"),
            *("-ex", f'printf "{show}\\n", {", ".join(f"(long)${name}" for name in names)}'),
            *("-ex", "x/s 0x5000", "-ex", "x/s 0xffff0000"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown in done.stdout
    assert '0x5000:\t"five"' in done.stdout
    assert '0xffff0000:\t"firmware"' in done.stdout


def test_recorded_machine_exports_its_registers(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(recorded("pc")[0].sent)
    convert(tmp_path / "stream", "elf-core", tmp_path / "core")
    found = read_core(tmp_path / "core")
    assert found.machine == EM_386
    (rip,) = struct.unpack_from("<Q", found.notes[1][2], 136)
    assert 0x7C00 <= rip < 0x7E00, "the guest runs in its boot sector"
    assert part(tmp_path / "core", found.loads[0].offset + 0x7C02, 2) == b"\x90\x90"
