"""Where the PC machines of QEMU put their main memory, and where ROM shows through it.

QEMU 7.2 ``hw/i386/pc_piix.c``, ``pc_q35.c`` and ``microvm.c`` (the split), ``pc.c`` (the sizes in
the CMOS), ``hw/pci-host/pam.c``, ``i440fx.c`` and ``q35.c`` (the PAM registers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmferry.errors import StreamError, UsageError, printable
from vmferry.units import format_size
from vmferry.vmstate.tree import Raw

from .devices import Devices, unreadable

FOUR_GIB: Final = 1 << 32

MAX_RAM: Final = 960 << 30
"""Main memory that is surely where it should be.  Machine types from 7.1 on move what is above
4 GiB to 1 TiB if the addresses in use would reach 1012 GiB and the CPU is one of AMD; the stream
does not tell whose CPU it is."""

ROM_AREA: Final = (0xC0000, 0x100000)
_BIOS_AREA: Final = (0xF0000, 0x100000)
_WINDOW: Final = 0x4000

_RTC: Final = "mc146818rtc"
_CMOS: Final = "cmos_data"
_CMOS_SIZE: Final = 128
_UNIT: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Board:
    """A kind of machine.

    Main memory is the block *ram*, unless a backend was named for it.  If it has *threshold* bytes
    or more, only the first *low* are below 4 GiB.  *bridge* is the kind of state of the host
    bridge, whose PAM registers start at *pam*; ``None`` where nothing switches the ROMs off.
    """

    ram: str
    threshold: int
    low: int
    bridge: str | None = None
    pam: int = 0


_BOARDS: Final = {
    "pc-i440fx-": Board("pc.ram", 0xE0000000, 0xC0000000, "I440FX", 0x59),
    "pc-q35-": Board("pc.ram", 0xB0000000, 0x80000000, "mch", 0x90),
    "microvm": Board("microvm.ram", 0xC0000000, 0xC0000000),
}


def board_of(machine: str | None) -> Board | None:
    """The board of a machine type, as streams name it; ``None`` where it is not known."""
    for name, board in _BOARDS.items():
        if machine == name or (machine and name.endswith("-") and machine.startswith(name)):
            return board
    return None


def low_memory(board: Board, size: int, devices: Devices | None) -> int:
    """How much of *size* bytes of main memory is below 4 GiB; the rest starts there.

    The rule of the board can be overruled by the option ``max-ram-below-4g``, which no stream
    names.  But QEMU writes both sizes to the CMOS for the firmware, so they are in the state of the
    clock.  A guest may write there too: sizes that do not add up are refused.
    """
    if size > MAX_RAM:
        raise UsageError(
            f"main memory of {format_size(size)}: above {format_size(MAX_RAM)} a stream does not"
            " tell where the part above 4 GiB begins"
        )
    usual = board.low if size >= board.threshold else size
    found = None if devices is None else _sizes_in_cmos(devices)
    if found is None and board.bridge is not None:
        raise StreamError("the state of the clock", "none", section=_RTC)
    if found is None or found == _units(usual, size):
        return usual
    below = size - found[1] * _UNIT
    if size % _UNIT == 0 and 0 < below < FOUR_GIB and found == _units(below, size):
        return below
    raise UsageError(
        f"main memory of {format_size(size)}: the machine's CMOS speaks of"
        f" {format_size(found[0] * _UNIT)} above 16 MiB and {format_size(found[1] * _UNIT)} above"
        " 4 GiB, which is something else; where memory lies cannot be told"
    )


def _units(below: int, size: int) -> tuple[int, int]:
    """What the CMOS says of memory between 16 MiB and 4 GiB, and above: units of 64 KiB."""
    return max(below - (16 << 20), 0) // _UNIT, (size - below) // _UNIT


def _sizes_in_cmos(devices: Devices) -> tuple[int, int] | None:
    clock = devices.only(_RTC)
    if clock is None:
        return None
    node = clock.get(_CMOS)
    if not isinstance(node, Raw) or len(node.data) != _CMOS_SIZE:
        raise unreadable(_RTC, f"{_CMOS} of {_CMOS_SIZE} bytes", node)
    cmos = node.data
    return int.from_bytes(cmos[0x34:0x36], "little"), int.from_bytes(cmos[0x5B:0x5E], "little")


def rom_windows(board: Board, devices: Devices | None) -> list[tuple[int, int]]:
    """Where below 1 MiB ROM is seen instead of main memory: start and end of each window.

    The firmware copies itself to memory and switches the ROMs off, area by area, in the PAM
    registers.  QEMU knows two states: with both bits of an area off its reads go to the ROM, else
    to memory.
    """
    if board.bridge is None or devices is None:
        return [ROM_AREA]
    bridge = devices.only(board.bridge)
    if bridge is None:
        raise StreamError("the state of the host bridge", "none", section=board.bridge)
    node = next((node for _, node in bridge.walk() if node.type == "pci config"), None)
    if not isinstance(node, Raw) or len(node.data) < board.pam + 7:
        raise unreadable(printable(bridge.name), "its PCI configuration", node)
    registers = node.data[board.pam : board.pam + 7]
    areas = [(_BIOS_AREA, registers[0] >> 4)]
    for index in range(12):
        start = ROM_AREA[0] + index * _WINDOW
        bits = registers[1 + index // 2] >> (4 * (index % 2))
        areas.append(((start, start + _WINDOW), bits))
    return [area for area, bits in areas if bits & 3 == 0]
