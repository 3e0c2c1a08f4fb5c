"""The manifest of a checkpoint: what the directory holds, and the checksum of each file.

The directory is complete once ``manifest.json`` is in it; while it is being written there is
``manifest.json.partial`` instead.  ``docs/checkpoint.md`` describes all of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

from .files import FileEntry

NAME: Final = "manifest.json"
PARTIAL: Final = "manifest.json.partial"
DEVICES: Final = "devices.bin"
DESCRIPTION: Final = "description.json"
BITMAPS: Final = "bitmaps.bin"

FORMAT: Final = "vmferry checkpoint"
VERSION: Final = 1

MAX_SIZE: Final = 32 << 20
"""Bytes of a manifest, enough for all the blocks, disks and devices that a stream may have."""

MAX_BITMAPS: Final = 256 << 20
"""Bytes of all dirty bitmaps; one of a disk of 16 TiB at QEMU's default granularity has 32 MiB."""


@dataclass(frozen=True, slots=True)
class RamEntry:
    """A RAM block: ``file`` has its bytes with holes for zero pages, ``sums`` a sum for each page.

    ``page_size`` and ``address`` as in the stream's block list.  ``ignored`` says that the source
    shared the block with its destination and sent no page of it.
    """

    name: str
    size: int
    file: str
    sums: FileEntry
    data_pages: int
    zero_pages: int
    page_size: int | None = None
    address: int | None = None
    ignored: bool = False


@dataclass(frozen=True, slots=True)
class DiskEntry:
    """A disk as it came in the stream, in chunks of 1 MiB: ``size`` is rounded up to one."""

    name: str
    size: int
    file: str
    sums: FileEntry


@dataclass(frozen=True, slots=True)
class SectionEntry:
    """A device section: *size* bytes from *offset* of ``devices.bin``, with head and footer."""

    name: str
    instance: int
    version: int
    number: int
    offset: int
    size: int
    early: bool = False


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything about a checkpoint but its bytes.

    ``page_size`` is the target page in bytes, ``capabilities`` are the source's as far as its
    stream showed them, ``stream_capabilities`` those that both sides must share.
    """

    machine: str | None
    page_size: int
    footers: bool
    ram: tuple[RamEntry, ...]
    sections: tuple[SectionEntry, ...]
    devices: FileEntry
    description: FileEntry | None = None
    disks: tuple[DiskEntry, ...] = ()
    bitmaps: FileEntry | None = None
    page_bits: int | None = None
    uuid: str | None = None
    capabilities: tuple[str, ...] = ()
    stream_capabilities: tuple[str, ...] = ()
    created: str = ""
    writer: str = ""

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return json.dumps({"format": FORMAT, "version": VERSION} | asdict(self), indent=2) + "\n"
