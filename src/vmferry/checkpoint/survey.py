"""What is in a saved machine: its table of contents, with its devices ready to be decoded.

A stream is read in one pass and in constant memory, but for its device state and a byte for each
page of the guest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import StreamError
from vmferry.pages import COMPRESS, PAGE, XBZRLE, ZERO
from vmferry.vmstate.decode import decode_device
from vmferry.vmstate.tree import DeviceState
from vmferry.wire.bitmap import BitmapStart
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import DeviceDescription, VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.ram import RamBlock, RamPages

SCHEMA: Final = 1
"""The version of what :meth:`Survey.to_json` returns; ``docs/inspect-json.md`` has it in full."""

KINDS: Final = {PAGE: "normal", ZERO: "zero", XBZRLE: "xbzrle", COMPRESS: "compressed"}
"""Kinds of page records, by flag."""


@dataclass(frozen=True, slots=True)
class BlockSurvey:
    """A RAM block: what its pages are in the end, and how they came.

    ``data_pages``, ``zero_pages`` and ``unsent_pages`` add up to all pages of the block.
    ``records`` counts page records by kind (normal, zero, xbzrle, compressed), of which a page may
    have any number; empty for a checkpoint, which keeps no records.
    """

    block: RamBlock
    data_pages: int
    zero_pages: int
    unsent_pages: int = 0
    records: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        counts = asdict(self)
        block: dict[str, Any] = counts.pop("block")
        return {"name": block.pop("name"), "size": block.pop("length")} | block | counts


@dataclass(slots=True)
class SectionSurvey:
    """A section, or all parts of one together: ``count`` of them, ``size`` bytes in all.

    ``kind`` is start, part, end or full; ``offset`` is where the (first) one begins in its stream.
    """

    kind: str
    name: str
    instance: int
    version: int
    number: int
    offset: int
    size: int = 0
    count: int = 1


@dataclass(slots=True)
class DiskSurvey:
    """A disk in the stream: its records of 1 MiB, and where the last of them ends."""

    chunks: int = 0
    zero_chunks: int = 0
    size: int = 0


@dataclass(slots=True)
class Survey:
    """The contents of a stream or a checkpoint.

    ``size`` is in bytes, of the whole stream or of all files; ``trailing`` is how many bytes stand
    behind the end of the stream (of a pipe: as far as they were read).  ``capabilities`` are the
    source's as far as they show.  ``commands`` counts them by name.  ``created`` is when a
    checkpoint was made, in ISO 8601.  ``error`` is what is wrong with a stream that was read as far
    as it could be.
    """

    source: str
    size: int = 0
    trailing: int = 0
    configuration: Configuration | None = None
    page_size: int = 0
    footers: bool = False
    capabilities: frozenset[str] = frozenset()
    blocks: list[BlockSurvey] = field(default_factory=list)
    sections: list[SectionSurvey] = field(default_factory=list, repr=False)
    commands: Counter[str] = field(default_factory=Counter)
    disks: dict[str, DiskSurvey] = field(default_factory=dict)
    bitmaps: list[BitmapStart] = field(default_factory=list)
    devices: list[DeviceSection | DeviceRegion] = field(default_factory=list, repr=False)
    description: VmDescription | None = field(default=None, repr=False)
    created: str | None = None
    error: StreamError | None = None

    @property
    def machine(self) -> str | None:
        """The machine type."""
        return self.configuration.machine if self.configuration else None

    def states(self, *patterns: str) -> Iterator[DeviceState]:
        """The decoded state of each device whose name matches a shell pattern, or of all.

        A device is named as its section, or with its instance behind a colon: ``cpu``, ``cpu:1``.
        """
        for _, state in self.decoded(*patterns):
            yield state

    def decoded(self, *patterns: str) -> Iterator[tuple[DeviceSection | DeviceRegion, DeviceState]]:
        """As :meth:`states`, with the section that each came in.

        Devices that nothing tells apart are one, named ``devices``, and stay bytes.
        """
        listed = self.description.devices if self.description else ()
        described = {(device.name, device.instance): device for device in listed}
        for section in self.devices:
            if isinstance(section, DeviceSection):
                key, start = (section.name, section.instance), section.body_offset
            else:
                key, start = (section.name, 0), section.offset
            names = (key[0], f"{key[0]}:{key[1]}")
            if any(fnmatchcase(name, pattern) for name in names for pattern in patterns or ("*",)):
                device = described.get(key) or DeviceDescription(*key, None, len(section.body))
                yield section, decode_device(device, section.body, start)

    def to_json(self, *patterns: str) -> dict[str, Any]:
        """Plain data for ``json.dumps``, with the devices that :meth:`states` gives for *patterns*.

        Everything but the bytes of guest memory and disks.
        """
        configuration = self.configuration
        uuid = configuration.uuid if configuration else None
        return {
            "schema": SCHEMA,
            "source": self.source,
            "size": self.size,
            "trailing": self.trailing,
            "created": self.created,
            "machine": self.machine,
            "uuid": str(uuid) if uuid else None,
            "page_size": self.page_size,
            "footers": self.footers,
            "capabilities": sorted(self.capabilities),
            "ram": [block.to_json() for block in self.blocks],
            "sections": [asdict(section) for section in self.sections],
            "commands": dict(self.commands),
            "disks": [{"name": name} | asdict(disk) for name, disk in self.disks.items()],
            "bitmaps": [_bitmap(start) for start in self.bitmaps],
            "devices": [_device(*pair) for pair in self.decoded(*patterns)],
            "error": self.error.to_json() if self.error else None,
        }


def _bitmap(start: BitmapStart) -> dict[str, Any]:
    flags = {"enabled": start.enabled, "persistent": start.persistent}
    return {"node": start.node, "name": start.name, "granularity": start.granularity} | flags


def _device(section: DeviceSection | DeviceRegion, state: DeviceState) -> dict[str, Any]:
    decoded = state.to_json()
    root = decoded.pop("state")
    version = section.version if isinstance(section, DeviceSection) else None
    return decoded | {"version": version, "reason": section.reason, "state": root}


@dataclass(slots=True)
class BlockTally:
    """Counts of one block while a stream is read."""

    block: RamBlock
    states: npt.NDArray[np.uint8]
    records: Counter[int] = field(default_factory=Counter)

    def add(self, batch: RamPages) -> None:
        """Count a batch of records."""
        kinds = batch.kinds
        first = int(kinds[0])
        pages = batch.offsets // np.uint64(batch.page_size)
        if (kinds == np.uint64(first)).all():  # nearly every batch is of one kind
            self.records[first] += len(kinds)
            self.states[pages] = 2 if first == ZERO else 1
            return
        for kind in KINDS:
            self.records[kind] += int(np.count_nonzero(kinds == np.uint64(kind)))
        self.states[pages] = np.where(kinds == np.uint64(ZERO), 2, 1)

    def survey(self) -> BlockSurvey:
        """The counts."""
        data, zero = (int(np.count_nonzero(self.states == state)) for state in (1, 2))
        records = {name: self.records[kind] for kind, name in KINDS.items()}
        return BlockSurvey(self.block, data, zero, len(self.states) - data - zero, records)
