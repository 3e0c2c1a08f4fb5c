"""Where a saved machine has its memory: told from its stream, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.checkpoint.machines import GIB, MIB, Device, Saved, bridge, clock
from tests.support.recorded import recorded
from vmferry import receive
from vmferry.checkpoint.export import Layout, layout_of
from vmferry.checkpoint.export.x86 import MAX_RAM, board_of, low_memory
from vmferry.errors import StreamError, UsageError

FOUR_GIB = 4 * GIB
PC = "pc-i440fx-7.2"
Q35 = "pc-q35-7.2"

Row = tuple[int, int, str, int]


def rows(layout: Layout) -> list[Row]:
    """Start, end, block and offset of each segment."""
    return [(s.address, s.end, s.block.name, s.offset) for s in layout.segments]


def pc(blocks: Mapping[str, int], pam: bytes = b"\x30" + b"\x33" * 6, **more: object) -> Saved:
    below = next(iter(blocks.values()))
    devices = [clock(below), bridge(pam=pam)]
    return Saved(machine=PC, blocks=blocks, devices=devices, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("machine", "size", "below"),
    [
        (PC, 3583 * MIB, 3583 * MIB),
        (PC, 3584 * MIB, 3072 * MIB),
        (Q35, 2815 * MIB, 2815 * MIB),
        (Q35, 2816 * MIB, 2048 * MIB),
        ("pc-q35-rhel9.2.0", 6 * GIB, 2048 * MIB),
        ("microvm", 3072 * MIB, 3072 * MIB),
        ("microvm", 3073 * MIB, 3072 * MIB),
        # max-ram-below-4g
        (PC, 128 * MIB, 64 * MIB),
        (PC, 3968 * MIB, 3968 * MIB),
        (Q35, 3 * GIB, 1 * GIB),
    ],
)
def test_memory_is_split_as_on_the_machine(
    machine: str, size: int, below: int, tmp_path: Path
) -> None:
    kind = "mch" if machine.startswith("pc-q35") else "I440FX"
    devices = [clock(below, size - below)]
    if machine != "microvm":
        devices.append(bridge(kind))
    saved = Saved(machine=machine, blocks={"m": size}, devices=devices)
    expected = [(0, below, "m", 0)]
    if size > below:
        expected.append((FOUR_GIB, FOUR_GIB + size - below, "m", below))
    with saved.checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == expected


def test_microvm_without_a_clock_or_a_description_has_the_usual_split(tmp_path: Path) -> None:
    with Saved(description=False).checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == [(0, 16 * MIB, "microvm.ram", 0)]


@pytest.mark.parametrize("size", [128 * MIB, 128 * MIB + 4096])
def test_sizes_in_the_cmos_that_do_not_add_up_are_refused(size: int, tmp_path: Path) -> None:
    saved = Saved(machine=PC, blocks={"m": size}, devices=[clock(64 * MIB, 32 * MIB), bridge()])
    with (
        saved.checkpoint(tmp_path) as checkpoint,
        pytest.raises(UsageError, match="CMOS speaks of 48 MiB above 16 MiB and 32 MiB above 4"),
    ):
        layout_of(checkpoint)


def test_memory_that_might_be_moved_to_1_tib_is_refused() -> None:
    board = board_of("microvm")
    assert board is not None
    assert low_memory(board, MAX_RAM, None) == 3 * GIB
    with pytest.raises(UsageError, match="960 GiB a stream does not tell"):
        low_memory(board, MAX_RAM + 4096, None)


BIOS = {"pc.ram": 32 * MIB, "pc.bios": 256 << 10, "pc.rom": 128 << 10}
TOP = (FOUR_GIB - (256 << 10), FOUR_GIB, "pc.bios", 0)


@pytest.mark.parametrize(
    ("pam", "low"),
    [
        (
            "00 00 00 00 00 00 00",
            [
                (0, 0xC0000, "pc.ram", 0),
                (0xC0000, 0xE0000, "pc.rom", 0),
                (0xE0000, 0x100000, "pc.bios", 128 << 10),
                (0x100000, 32 * MIB, "pc.ram", 0x100000),
            ],
        ),
        ("30 33 33 33 33 33 33", [(0, 32 * MIB, "pc.ram", 0)]),
        # Readable or writable alone is memory too.
        ("10 21 12 12 12 12 12", [(0, 32 * MIB, "pc.ram", 0)]),
        (
            "00 33 33 33 33 33 33",
            [
                (0, 0xF0000, "pc.ram", 0),
                (0xF0000, 0x100000, "pc.bios", 192 << 10),
                (0x100000, 32 * MIB, "pc.ram", 0x100000),
            ],
        ),
        (
            "30 03 33 33 33 33 03",
            [
                (0, 0xC4000, "pc.ram", 0),
                (0xC4000, 0xC8000, "pc.rom", 0x4000),
                (0xC8000, 0xEC000, "pc.ram", 0xC8000),
                (0xEC000, 0xF0000, "pc.bios", 0x2C000),
                (0xF0000, 32 * MIB, "pc.ram", 0xF0000),
            ],
        ),
    ],
)
def test_rom_shows_where_the_pam_registers_let_it(pam: str, low: list[Row], tmp_path: Path) -> None:
    with pc(BIOS, bytes.fromhex(pam)).checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == [*low, TOP]


def test_rom_of_a_microvm_always_shows(tmp_path: Path) -> None:
    saved = Saved(blocks={"microvm.ram": 16 * MIB, "pc.bios": 64 << 10})
    with saved.checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == [
            (0, 0xF0000, "microvm.ram", 0),
            (0xF0000, 0x100000, "pc.bios", 0),
            (0x100000, 16 * MIB, "microvm.ram", 0x100000),
            (FOUR_GIB - (64 << 10), FOUR_GIB, "pc.bios", 0),
        ]


@pytest.mark.parametrize("mirror", [True, False])
def test_flash_ends_at_4_gib_one_below_the_other(mirror: bool, tmp_path: Path) -> None:
    flash = {"system.flash0": 1 * MIB, "system.flash1": 512 << 10}
    copies = {"isa-bios": 128 << 10} if mirror else {}
    saved = pc({"pc.ram": 32 * MIB} | flash | copies, bytes(7))
    with saved.checkpoint(tmp_path) as checkpoint:
        found = rows(layout_of(checkpoint))
    assert found[-2:] == [
        (FOUR_GIB - 1536 * 1024, FOUR_GIB - MIB, "system.flash1", 0),
        (FOUR_GIB - MIB, FOUR_GIB, "system.flash0", 0),
    ]
    source = ("isa-bios", 0) if mirror else ("system.flash0", 896 << 10)
    assert (0xE0000, 0x100000, *source) in found


def test_memory_up_to_4_gib_hides_the_firmware(tmp_path: Path) -> None:
    saved = pc({"pc.ram": 4095 * MIB + (512 << 10), "pc.bios": 1 * MIB})
    with saved.checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == [
            (0, FOUR_GIB - (512 << 10), "pc.ram", 0),
            (FOUR_GIB - (512 << 10), FOUR_GIB, "pc.bios", 512 << 10),
        ]


def test_memory_of_devices_is_left_out_by_name(tmp_path: Path) -> None:
    outside = ["0000:00:02.0/vga.vram", "vga.rom", "/rom@etc/acpi/tables", "tpm-ppi"]
    saved = pc({"pc.ram": 32 * MIB} | dict.fromkeys(outside, 4096))
    with saved.checkpoint(tmp_path) as checkpoint:
        layout = layout_of(checkpoint)
    assert [block.name for block in layout.left_out] == outside
    assert rows(layout) == [(0, 32 * MIB, "pc.ram", 0)]


def test_blocks_of_numa_nodes_follow_each_other_by_their_addresses(tmp_path: Path) -> None:
    saved = Saved(
        machine=PC,
        blocks={"a": 32 * MIB, "b": 96 * MIB, "pc.bios": 4096},
        addresses={"a": 96 * MIB, "b": 0, "pc.bios": FOUR_GIB - 4096},
        pages={(name, 0): b"x" for name in ("a", "b", "pc.bios")},
        devices=[clock(64 * MIB, 64 * MIB), bridge()],
    )
    with saved.checkpoint(tmp_path) as checkpoint:
        assert rows(layout_of(checkpoint)) == [
            (0, 64 * MIB, "b", 0),
            (FOUR_GIB - 4096, FOUR_GIB, "pc.bios", 0),
            (FOUR_GIB, FOUR_GIB + 32 * MIB, "b", 64 * MIB),
            (FOUR_GIB + 32 * MIB, FOUR_GIB + 64 * MIB, "a", 0),
        ]


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (pc({"pc.ram": 32 * MIB, "d0": 16 * MIB}), 'blocks "pc.ram", "d0": one of them is main'),
        (pc({"m0": 32 * MIB, "d0": 16 * MIB}), 'blocks "m0", "d0": one of them is main'),
        # A module plugged in behind a hole has an address inside the area of such modules.
        (
            pc({"m0": 32 * MIB, "d0": 16 * MIB}, addresses={"m0": 0, "d0": 0}),
            "the stream does not tell where they lie",
        ),
        (
            pc(
                {"m0": 32 * MIB, "d0": 16 * MIB},
                addresses={"m0": 0, "d0": 32 * MIB},
                pages={("m0", 0): b"x", ("d0", 0): b"x"},
            ),
            "main memory of 48 MiB: the machine's CMOS speaks of 16 MiB above 16 MiB",
        ),
        (pc({"pc.bios": 1 * MIB}), "no block is main memory"),
        (pc({"pc.ram": 32 * MIB, "pc.bios": 300 * MIB}), '"pc.bios" has 300 MiB, more than there'),
        (pc({"pc.ram": 32 * MIB, "pc.rom": 1 * MIB}), '"pc.rom" has 1 MiB, more than there'),
        (
            pc({"pc.ram": 32 * MIB}, addresses={"pc.ram": 0}),
            'the source shared block "pc.ram" with its destination',
        ),
        (Saved(machine="virt-7.2"), 'the memory of machine "virt-7.2" is not known; in a'),
        (Saved(machine="pc-q36-7.2"), '"pc-q36-7.2" is not known'),
        (Saved(machine="microvmx"), '"microvmx" is not known'),
        (
            Saved(machine=PC, blocks={"pc.ram": MIB}, description=False),
            "had no description of its devices",
        ),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(saved: Saved, message: str, tmp_path: Path) -> None:
    with (
        saved.checkpoint(tmp_path) as checkpoint,
        pytest.raises(UsageError, match=message),
    ):
        layout_of(checkpoint)


def test_memory_of_virtio_mem_is_not_taken_for_that_of_a_device(tmp_path: Path) -> None:
    plugged = Device(kind="virtio", name="0000:00:02.0/virtio-mem", fields=[])
    saved = Saved(
        machine=PC,
        blocks={"pc.ram": 32 * MIB, "0000:00:02.0/vm0": 16 * MIB},
        devices=[clock(32 * MIB), bridge(), plugged],
    )
    with (
        saved.checkpoint(tmp_path) as checkpoint,
        pytest.raises(UsageError, match=r'"0000:00:02\.0/vm0"'),
    ):
        layout_of(checkpoint)


SHORT = Device(kind="mc146818rtc", fields=[("cmos_data", "buffer", bytes(64))])
BARE = Device(kind="I440FX", fields=[("config[0]", "pci config", bytes(64))])


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], 'expected the state of the clock, found none .section "mc146818rtc"'),
        ([clock(32 * MIB)], "expected the state of the host bridge, found none"),
        ([SHORT, bridge()], "expected cmos_data of 128 bytes, found 64 bytes of type buffer"),
        ([clock(32 * MIB), BARE], "expected its PCI configuration, found 64 bytes"),
        (
            [clock(32 * MIB), bridge(), Device(kind="I440FX", name="x", fields=BARE.fields)],
            "expected one device of this kind, found 2",
        ),
    ],
)
def test_devices_that_are_not_as_they_must_be_are_refused(
    devices: list[Device], message: str, tmp_path: Path
) -> None:
    saved = Saved(machine=PC, blocks={"pc.ram": 32 * MIB}, devices=devices)
    with (
        saved.checkpoint(tmp_path) as checkpoint,
        pytest.raises(StreamError, match=message),
    ):
        layout_of(checkpoint)


@pytest.mark.parametrize("name", ["pc-2.3", "ppc-g3beige"])
def test_recorded_machine_without_a_known_layout_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(recorded(name)[0].sent)
    with (
        receive(f"file:{tmp_path / 'stream'}", tmp_path / "checkpoint") as checkpoint,
        pytest.raises(UsageError, match="is not known; in a checkpoint each block"),
    ):
        layout_of(checkpoint)
