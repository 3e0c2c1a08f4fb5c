"""Where things are in the memory of the guest, and what the board writes there before it starts.

Addresses are offsets in the RAM block, and the guest's virtual addresses as well: its page tables
hide that RAM above 3 GiB lies above 4 GiB in physical memory, as on a PC.

====================  =========================================================
0x1000                the segment descriptors
0x2000                the code
0x4000                a page for each vCPU: :data:`BLOCK`
``tables``            page tables
``base``              the working set: first what is rewritten, then what is only read
====================  =========================================================

Everything else is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError
from vmferry.machines.addresses import DISK, DISK_STRIDE, HOLE_END, HOLE_START, TIMER, TIMER_STRIDE
from vmferry.machines.config import PAGE, MachineConfig
from vmferry.units import format_size

GDT: Final = 0x1000
CODE: Final = 0x2000
BLOCKS: Final = 0x4000

BLOCK: Final = np.dtype(
    [
        # Written by the board
        ("index", "<u8"),
        ("base", "<u8"),
        ("hot_first", "<u8"),
        ("hot_count", "<u8"),
        ("cold_first", "<u8"),
        ("cold_count", "<u8"),
        ("rate", "<u8"),  # pages per second, 0 without limit
        ("changed", "<u8"),  # lines of 64 bytes that are rewritten, 1 to 63
        ("timer", "<u8"),  # virtual address of the vCPU's registers in the interval timer
        ("interval", "<u8"),  # between two heartbeats, in ns
        ("cpus", "<u8"),
        ("rest", "<u8"),  # the port that is written to rest until the alarm
        # Written by the guest
        ("hot_steps", "<u8"),  # pages rewritten
        ("cold_steps", "<u8"),  # pages read, or filled in the first walk
        ("kind", "<u8"),  # of what it found wrong, 0 for nothing
        ("page", "<u8"),
        ("expected", "<u8"),
        ("found", "<u8"),
        ("last_beat", "<u8"),
        ("records", "<u8"),  # of the journal that were acknowledged and read back
        ("head", "<u8"),  # requests that the disk was given
        # Written by the board
        ("disk", "<u8"),  # virtual address of its registers, 0 where there is none
        ("slots", "<u8"),  # sectors of the journal
    ]
)
"""What a vCPU is told and what it keeps.

Behind it, from 0x100 on: a line of text, two sectors and a ring of the journal, the stack.
"""

BLOCK_LINE: Final = 0x100
BLOCK_RECORD: Final = 0x800
BLOCK_READ: Final = 0xA00
BLOCK_RING: Final = 0xC00
OFFSETS: Final = {name: int(place[1]) for name, place in (BLOCK.fields or {}).items()}
"""Where in a block each of its words is."""

PARAMETERS: Final = OFFSETS["hot_steps"]
"""Bytes of a block that only the board writes."""

_LARGE: Final = 2 << 20
_DEVICES: Final = 1 << 39
"""Virtual address of the 2 MiB of devices that the timer lies in."""

_DEVICES_PHYSICAL: Final = TIMER // _LARGE * _LARGE
_TABLE_BYTES: Final = 512 * _LARGE
# Present, writable, for all rings, and already accessed and dirty, so that no processor writes it.
_TABLE: Final = 0x27
_PAGE: Final = 0xE7
_UNCACHED: Final = 0x18


@dataclass(frozen=True, slots=True)
class Share:
    """What a vCPU walks over, in pages of the working set."""

    hot_first: int
    hot_count: int
    cold_first: int
    cold_count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a machine: bytes from the start of RAM, and counts of pages."""

    ram: int
    cpus: int
    tables: int
    base: int
    pages: int
    hot: int

    @classmethod
    def of(cls, config: MachineConfig) -> Layout:
        """The layout of a machine; raises :class:`UsageError` where the walk does not fit."""
        tables = BLOCKS + config.cpus * PAGE
        directories = -(-config.ram // _TABLE_BYTES)
        base = tables + (4 + directories) * PAGE
        wanted = config.guest.working_set
        if wanted is None:
            wanted = config.ram // 2 // PAGE * PAGE
        if base + wanted > config.ram:
            raise UsageError(
                f"guest.working-set: expected at most {format_size(config.ram - base)} in "
                f"{format_size(config.ram)} of ram, found {format_size(wanted)}"
            )
        pages = wanted // PAGE
        return cls(config.ram, config.cpus, tables, base, pages, round(pages * config.guest.hot))

    @property
    def end(self) -> int:
        """Where the working set ends."""
        return self.base + self.pages * PAGE

    def share(self, index: int) -> Share:
        """What the vCPU *index* walks over."""

        def part(count: int) -> tuple[int, int]:
            first, end = count * index // self.cpus, count * (index + 1) // self.cpus
            return first, end - first

        cold_first, cold_count = part(self.pages - self.hot)
        return Share(*part(self.hot), self.hot + cold_first, cold_count)

    def block(self, index: int) -> int:
        """Where the block of the vCPU *index* is."""
        return BLOCKS + index * PAGE


def timer_address(index: int) -> int:
    """The virtual address of the timer's registers for the vCPU *index*."""
    return _DEVICES + TIMER - _DEVICES_PHYSICAL + index * TIMER_STRIDE


def disk_address(index: int) -> int:
    """The virtual address of the registers of the disk *index*."""
    return _DEVICES + DISK - _DEVICES_PHYSICAL + index * DISK_STRIDE


def page_tables(layout: Layout) -> npt.NDArray[np.uint64]:
    """The page tables, for :attr:`Layout.tables`: RAM as one piece, and the devices.

    AMD64 Architecture Programmer's Manual, volume 2, 5.3: four levels, with pages of 2 MiB.
    """
    count = (layout.base - layout.tables) // PAGE
    tables = np.zeros((count, 512), np.uint64)
    root, low, devices, large, *_ = range(count)

    def entry(table: int) -> int:
        return (layout.tables + table * PAGE) | _TABLE

    tables[root, :2] = entry(low), entry(devices)
    tables[devices, 0] = entry(large)
    tables[large, 0] = _DEVICES_PHYSICAL | _PAGE | _UNCACHED
    tables[low, : count - 4] = [entry(table) for table in range(4, count)]
    virtual = np.arange((count - 4) * 512, dtype=np.uint64) * np.uint64(_LARGE)
    hole = np.uint64(HOLE_END - HOLE_START)
    physical = np.where(virtual < HOLE_START, virtual, virtual + hole)
    tables[4:] = (physical | np.uint64(_PAGE)).reshape(-1, 512)
    return tables
