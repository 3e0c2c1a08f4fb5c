"""Guest-physical memory: which bytes of which block the machine sees at which address.

Known for QEMU's machines ``pc`` (i440fx), ``q35`` and ``microvm``.  What is laid out is main memory
and the ROMs of the board, each where QEMU 7.2 ``hw/i386/pc.c``, ``pc_sysfw.c`` and ``x86.c`` put
it: firmware ends at 4 GiB and shows its last 128 KiB below 1 MiB too, ``pc.rom`` (option ROMs)
starts at 768 KiB.  Below 1 MiB the ROMs are there where the machine's own registers let them be
seen.

Two things differ from what a CPU reads.  Memory of devices (video memory, option ROMs of PCI cards,
registers) is not laid out; the guest moves it about.  And main memory that devices cover, or that
is for system management mode alone (0xa0000 to 0xbffff behind a VGA card, TSEG), is shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.errors import UsageError, printable
from vmferry.units import format_size
from vmferry.wire.ram import RamBlock

from .devices import Devices
from .x86 import FOUR_GIB, ROM_AREA, Board, board_of, low_memory, rom_windows

_BIOS: Final = "pc.bios"
_FLASH: Final = ("system.flash0", "system.flash1")
_MIRROR: Final = "isa-bios"
_OPTION_ROM: Final = "pc.rom"
_ROMS: Final = frozenset({_BIOS, *_FLASH, _MIRROR, _OPTION_ROM})

_MIRROR_SIZE: Final = 128 << 10
_MAX_FIRMWARE: Final = 256 << 20
"""More than this below 4 GiB would meet the interrupt controllers; QEMU allows 16 MiB."""

_DEVICES: Final = frozenset({"vga.vram", "vga.rom", "tpm-ppi", "tpm-crb-cmd"})
"""Blocks of devices on buses whose devices have no path to be named by."""

_HANDED_OVER: Final = "/rom@"
"""How the names of blocks begin that the guest gets through fw_cfg and not at an address."""


@dataclass(frozen=True, slots=True)
class Segment:
    """*size* bytes from *offset* of a block, seen at *address*."""

    address: int
    size: int
    block: RamBlock
    offset: int

    @property
    def end(self) -> int:
        """The address behind it."""
        return self.address + self.size

    def part(self, start: int, end: int) -> Segment:
        """The part between two addresses inside it."""
        return replace(
            self, address=start, size=end - start, offset=self.offset + start - self.address
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """All of memory: segments in ascending order, none overlapping; what lies between is nothing.

    ``left_out`` are the blocks that have no part in it.
    """

    segments: tuple[Segment, ...]
    left_out: tuple[RamBlock, ...]

    @property
    def end(self) -> int:
        """The address behind the last byte."""
        return self.segments[-1].end

    @property
    def size(self) -> int:
        """Bytes of all segments."""
        return sum(segment.size for segment in self.segments)


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout of the memory of the machine in *checkpoint*.

    Raises :class:`UsageError` that says what is not known where it cannot be told for certain.
    """
    configuration = checkpoint.configuration
    machine = configuration.machine if configuration is not None else None
    board = board_of(machine)
    if board is None:
        kind = (
            f"machine {printable(machine)}"
            if machine
            else "a machine that its stream does not name"
        )
        raise _unknown(f"the layout of the memory of {kind} is not known")
    described = board.bridge is not None or checkpoint.description is not None
    devices = Devices(checkpoint) if described else None
    main = _main_memory(checkpoint, board)
    ram = _place_main(main, low_memory(board, sum(b.length for b in main), devices))
    roms = _place_roms(checkpoint)
    windows = rom_windows(board, devices)
    shown = [part for rom in roms for part in _clip(rom, windows)]
    segments = _merge(_cover(_cover(roms, ram), shown))
    _check_content(checkpoint, segments)
    used = {segment.block.name for segment in segments}
    return Layout(segments, tuple(b for b in checkpoint.blocks if b.name not in used))


def _unknown(what: str) -> UsageError:
    return UsageError(f"{what}; in a checkpoint each block of memory is a plain file of its own")


# Main memory


def _main_memory(checkpoint: Checkpoint, board: Board) -> tuple[RamBlock, ...]:
    """The blocks of main memory in order; one, but for NUMA nodes with memory of their own."""
    found = [block for block in checkpoint.blocks if not _belongs_elsewhere(checkpoint, block)]
    if not found:
        raise _unknown("no block is main memory")
    if len(found) == 1:
        return (found[0],)
    # An address in the stream is one inside main memory, or inside the area of memory plugged in.
    found.sort(key=lambda block: block.address or 0)
    ends = [sum(block.length for block in found[:index]) for index in range(len(found))]
    is_plugged = any(block.name == board.ram for block in found)
    if not is_plugged and [block.address for block in found] == ends:
        return tuple(found)
    names = ", ".join(printable(block.name) for block in found)
    raise _unknown(
        f"blocks {names}: one of them is main memory, others were plugged in or are part of it,"
        " and the stream does not tell where they lie",
    )


def _belongs_elsewhere(checkpoint: Checkpoint, block: RamBlock) -> bool:
    """Whether the block is a ROM of the board or belongs to a device."""
    if block.name in _ROMS or block.name in _DEVICES or block.name.startswith(_HANDED_OVER):
        return True
    path, slash, _ = block.name.rpartition("/")
    if not slash or block.name.startswith("/"):
        return False
    # The memory of a virtio-mem device is named as a device's own, but is plugged in.
    plugs = f"{path}/virtio-mem"
    return not any(section.name.startswith(plugs) for section in checkpoint.manifest.sections)


def _place_main(blocks: Sequence[RamBlock], below: int) -> list[Segment]:
    """The *blocks* one behind the other, with a gap between *below* and 4 GiB."""
    placed = []
    start = 0
    for block in blocks:
        end = start + block.length
        split = min(max(below, start), end)
        if start < split:
            placed.append(Segment(start, split - start, block, 0))
        if split < end:
            address = FOUR_GIB + split - below
            placed.append(Segment(address, end - split, block, split - start))
        start = end
    return placed


# ROM


def _place_roms(checkpoint: Checkpoint) -> list[Segment]:
    """The ROMs of the board, everywhere they are seen if nothing covers them."""
    blocks = {block.name: block for block in checkpoint.blocks if block.length}
    firmware = [blocks[name] for name in _FLASH if name in blocks] or [
        blocks[name] for name in (_BIOS,) if name in blocks
    ]
    if sum(block.length for block in firmware) > _MAX_FIRMWARE:
        raise _too_large(firmware[0])
    placed = []
    address = FOUR_GIB
    for block in firmware:
        address -= block.length
        placed.append(Segment(address, block.length, block, 0))
    # With flash, QEMU before 9.1 shows a copy of it below 1 MiB, which is a block of its own.
    if mirrored := blocks.get(_MIRROR, firmware[0] if firmware else None):
        size = min(mirrored.length, _MIRROR_SIZE)
        placed.append(Segment(ROM_AREA[1] - size, size, mirrored, mirrored.length - size))
    if options := blocks.get(_OPTION_ROM):
        if options.length > _MIRROR_SIZE:
            raise _too_large(options)
        placed.append(Segment(ROM_AREA[0], options.length, options, 0))
    return placed


def _too_large(block: RamBlock) -> UsageError:
    return _unknown(
        f"block {printable(block.name)} has {format_size(block.length)}, more than there is room"
        " for where it should lie",
    )


# Segments


def _clip(segment: Segment, windows: Iterable[tuple[int, int]]) -> list[Segment]:
    """What of *segment* is inside the *windows*."""
    parts = [(max(segment.address, start), min(segment.end, end)) for start, end in windows]
    return [segment.part(start, end) for start, end in parts if start < end]


def _cover(below: Iterable[Segment], above: Sequence[Segment]) -> list[Segment]:
    """Both, with what is *above* hiding what is *below* it."""
    rest = list(below)
    for cover in above:
        outside = [(0, cover.address), (cover.end, 1 << 64)]
        rest = [part for segment in rest for part in _clip(segment, outside)]
    return [*rest, *above]


def _merge(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """In ascending order; neighbours that are neighbours in their block too become one."""
    merged: list[Segment] = []
    for segment in sorted(segments, key=lambda segment: segment.address):
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.end, last.block) == (segment.address, segment.block)
            and last.offset + last.size == segment.offset
        ):
            merged[-1] = replace(last, size=last.size + segment.size)
        else:
            merged.append(segment)
    return tuple(merged)


def _check_content(checkpoint: Checkpoint, segments: Iterable[Segment]) -> None:
    for block in {segment.block.name: segment.block for segment in segments}.values():
        if checkpoint.memory(block) is None:
            raise UsageError(
                f"the source shared block {printable(block.name)} with its"
                " destination (x-ignore-shared), so its content is not in the checkpoint; save the"
                " machine again without that capability"
            )
