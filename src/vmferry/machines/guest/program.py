"""The guest as an image, and its memory as it is before the first instruction.

No instruction of it reads, changes and writes the same memory (``inc [rbx]``): the emulator may
execute the last one before a pause twice (:mod:`vmferry.machines.unicorn.host`).
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.machines.addresses import REST_PORT
from vmferry.machines.config import MachineConfig
from vmferry.machines.listing import assemble

from . import journal, pages, schedule, walk, words
from .layout import (
    BLOCK,
    BLOCK_LINE,
    BLOCK_READ,
    BLOCK_RECORD,
    BLOCK_RING,
    CODE,
    GDT,
    OFFSETS,
    PARAMETERS,
    Layout,
    disk_address,
    page_tables,
    timer_address,
)

DESCRIPTORS: Final = (0, 0x00AFFB000000FFFF, 0x00CFF3000000FFFF)
"""Null, 08: code of 64 bits, 10: data; both for ring 3, and accessed already."""


@cache
def code() -> bytes:
    """The code, for the address :data:`~.layout.CODE`; the same for every machine."""
    offsets = {name.upper(): offset for name, offset in OFFSETS.items()}
    constants = {
        name: getattr(pages, name) for name in ("MAGIC", "PAGE_FACTOR", "SEED_FACTOR", "WORD_STEP")
    }
    places = {
        "LINE": BLOCK_LINE,
        "RECORD": BLOCK_RECORD,
        "READ": BLOCK_READ,
        "RING": BLOCK_RING,
    }
    return assemble(
        schedule.LISTING + walk.LISTING + words.LISTING + journal.LISTING,
        origin=CODE,
        parameters=offsets | constants | places,
    )


def constants(config: MachineConfig) -> dict[int, npt.NDArray[np.uint8]]:
    """What lies where in memory and is not changed by the guest."""
    layout = Layout.of(config)
    parts: dict[int, npt.NDArray[np.generic]] = {
        GDT: np.array(DESCRIPTORS, "<u8"),
        CODE: np.frombuffer(code(), np.uint8),
        layout.tables: page_tables(layout),
    }
    for index in range(config.cpus):
        parts[layout.block(index)] = _block(config, index).view(np.uint8)[:PARAMETERS]
    return {start: part.reshape(-1).view(np.uint8) for start, part in parts.items()}


def install(ram: npt.NDArray[np.uint8], config: MachineConfig, *, journal_sectors: int = 0) -> None:
    """Write the guest into *ram*, which is zero; it keeps a journal of so many sectors if any."""
    for start, part in constants(config).items():
        ram[start : start + len(part)] = part
    if journal_sectors:
        first = Layout.of(config).block(0)
        block = ram[first : first + BLOCK.itemsize].view(BLOCK)
        block["disk"], block["slots"] = disk_address(0), journal_sectors


def _block(config: MachineConfig, index: int) -> npt.NDArray[np.void]:
    """The block of the vCPU *index*, an array of one."""
    layout, guest = Layout.of(config), config.guest
    share = layout.share(index)
    block = np.zeros(1, BLOCK)
    block["index"], block["base"], block["cpus"] = index, layout.base, config.cpus
    block["hot_first"], block["hot_count"] = share.hot_first, share.hot_count
    block["cold_first"], block["cold_count"] = share.cold_first, share.cold_count
    if guest.rate is not None:
        before, after = (guest.rate * number // config.cpus for number in (index, index + 1))
        block["rate"] = max(1, after - before)
    block["changed"] = changed_lines(guest.changed)
    block["rest"] = REST_PORT + index
    block["timer"] = timer_address(index)
    block["interval"] = round(guest.heartbeat * 1e9)
    return block


def changed_lines(share: float) -> int:
    """How many lines of a page are rewritten where that *share* of it is to change."""
    return max(1, round(share * pages.LINES))
