"""A checkpoint directory, opened: its parts, checked when they are used.

Opening reads the manifest and looks at the sizes of the files, whatever the size of the machine;
:meth:`Checkpoint.verify` reads everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import numpy as np

from vmferry.errors import CheckpointDamaged, StreamError
from vmferry.wire.bitmap import BitmapReader, BitmapRecord, BitmapStart
from vmferry.wire.buffer import Cursor, ReceiveBuffer
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import parse_description
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.layout import DISK_CHUNK_SIZE, Kind
from vmferry.wire.ram import RamBlock
from vmferry.wire.sections import SectionFooter, SectionStart

from . import manifest as m
from .pages import Sums, check_pages, storage_error
from .survey import BlockSurvey, DiskSurvey, SectionSurvey, Survey, total_size

_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""How many pieces the kernel fills in one call."""


class StoredPages:
    """The pages of a RAM block or disk in a checkpoint; a ``PageStore`` of a source."""

    def __init__(self, path: Path, size: int, page_size: int, sums: Callable[[], Sums]) -> None:
        self.path = path
        self.size = size
        self.page_size = page_size
        self._load_sums = sums
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise storage_error(path, "opened", error) from None

    @cached_property
    def sums(self) -> Sums:
        """A number for each page, 0 for a zero page."""
        return self._load_sums()

    def read(self, offset: int, *buffers: memoryview) -> None:
        """Fill *buffers*, one behind the other, with the bytes from *offset* on.

        May be called by several threads.
        """
        left = list(buffers)
        while left:
            window = left[:_IOV_MAX]
            try:
                count = os.preadv(self._fd, window, offset)
            except OSError as error:
                raise storage_error(self.path, "read", error) from None
            if count == 0:
                raise CheckpointDamaged(f"{self.path}: shorter than {self.size} bytes")
            offset += count
            if count == sum(map(len, window)):  # nearly always
                del left[:_IOV_MAX]
                continue
            while count >= len(left[0]):
                count -= len(left.pop(0))
            left[0] = left[0][count:]

    def verify(self) -> None:
        """Hold every page against its sum."""
        check_pages(self.path, self.sums, self.page_size)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._fd)


class Checkpoint:
    """A saved machine: a directory written by ``vmferry receive``.

    A context manager; the files of guest memory stay open until it is left.  Raises
    :class:`StorageError` where the directory is missing, incomplete or does not fit its manifest.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = m.read_manifest(self.path)
        self._open = ExitStack()
        self._check_sizes()
        if verify:
            self.verify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back."""
        self._open.close()

    # The machine

    @property
    def configuration(self) -> Configuration | None:
        """The machine type and what goes with it."""
        manifest = self.manifest
        if manifest.machine is None:
            return None
        uuid = UUID(manifest.uuid) if manifest.uuid else None
        return Configuration(
            manifest.machine, manifest.page_bits, manifest.stream_capabilities, uuid
        )

    @property
    def page_size(self) -> int:
        """Bytes of a target page."""
        return self.manifest.page_size

    @property
    def footers(self) -> bool:
        """Whether sections end with a footer."""
        return self.manifest.footers

    # Guest memory and disks

    @cached_property
    def blocks(self) -> tuple[RamBlock, ...]:
        """Guest memory, in the order of the block list."""
        return tuple(
            RamBlock(entry.name, entry.size, entry.page_size, entry.address)
            for entry in self.manifest.ram
        )

    @cached_property
    def _memory(self) -> dict[str, StoredPages]:
        return {e.name: self._stored(e, self.page_size) for e in self.manifest.ram if not e.ignored}

    def memory(self, block: RamBlock) -> StoredPages | None:
        """The content of a block; ``None`` where the source shared it and sent none."""
        return self._memory.get(block.name)

    @cached_property
    def disks(self) -> Sequence[tuple[str, StoredPages]]:
        """Disks that the stream carried, in pages of 1 MiB."""
        return [(e.name, self._stored(e, DISK_CHUNK_SIZE)) for e in self.manifest.disks]

    def _stored(self, entry: m.RamEntry | m.DiskEntry, page_size: int) -> StoredPages:
        def sums() -> Sums:
            return np.frombuffer(self._read(entry.sums), "<u8")

        pages = StoredPages(self.path / entry.file, entry.size, page_size, sums)
        self._open.callback(pages.close)
        return pages

    @cached_property
    def bitmaps(self) -> tuple[BitmapRecord, ...]:
        """Dirty bitmaps, as the records of their section."""
        if self.manifest.bitmaps is None:
            return ()
        data = self._read(self.manifest.bitmaps)
        return tuple(_parse_bitmaps(self.path / m.BITMAPS, data))

    # Devices

    @cached_property
    def _device_bytes(self) -> bytes:
        return self._read(self.manifest.devices)

    def _slices(self, *, early: bool) -> list[bytes]:
        if not self.manifest.sections and not early:
            return [self._device_bytes]
        return [
            self._device_bytes[entry.offset : entry.offset + entry.size]
            for entry in self.manifest.sections
            if entry.early == early
        ]

    @property
    def numbers(self) -> frozenset[int]:
        """Section numbers in use by the devices."""
        return frozenset(entry.number for entry in self.manifest.sections)

    @property
    def early(self) -> list[bytes]:
        """Device sections that stand before guest memory, whole."""
        return self._slices(early=True)

    @property
    def devices(self) -> list[bytes]:
        """The other device sections, whole."""
        return self._slices(early=False)

    @cached_property
    def description(self) -> bytes | None:
        """The stream's closing description of its devices."""
        entry = self.manifest.description
        return None if entry is None else self._read(entry)

    @cached_property
    def device_sections(self) -> tuple[DeviceSection | DeviceRegion, ...]:
        """The device sections taken apart; their offsets are those in ``devices.bin``."""
        data = self._device_bytes
        if not self.manifest.sections and data:
            return (DeviceRegion(0, data),)
        return tuple(self._section(entry, data) for entry in self.manifest.sections)

    def _section(self, entry: m.SectionEntry, data: bytes) -> DeviceSection:
        start = SectionStart(entry.number, entry.name, entry.instance, entry.version)
        head = start.encode(Kind.FULL)
        foot = SectionFooter(entry.number).encode() if self.footers else b""
        whole = data[entry.offset : entry.offset + entry.size]
        if not whole.startswith(head) or not whole.endswith(foot):
            raise CheckpointDamaged(
                f"{self.path / m.DEVICES}: section {entry.name} is not where the manifest says"
            )
        body = whole[len(head) : len(whole) - len(foot)]
        return DeviceSection(
            entry.number,
            entry.name,
            entry.instance,
            entry.version,
            entry.offset,
            body,
            self.footers,
        )

    def survey(self) -> Survey:
        """The checkpoint's contents."""
        manifest = self.manifest
        blocks = [
            BlockSurvey(block, entry.data_pages, entry.zero_pages)
            for block, entry in zip(self.blocks, manifest.ram, strict=True)
        ]
        sections = [
            SectionSurvey("full", e.name, e.instance, e.version, e.number, e.offset, e.size)
            for e in manifest.sections
        ]
        disks = {
            name: DiskSurvey(len(disk.sums), int(np.count_nonzero(disk.sums == 0)), disk.size)
            for name, disk in self.disks
        }
        description = self.description
        return Survey(
            source=str(self.path),
            size=total_size(self.path),
            configuration=self.configuration,
            page_size=self.page_size,
            footers=self.footers,
            capabilities=frozenset(manifest.capabilities),
            blocks=blocks,
            sections=sections,
            disks=disks,
            bitmaps=[record for record in self.bitmaps if isinstance(record, BitmapStart)],
            devices=list(self.device_sections),
            description=parse_description(description) if description else None,
            created=manifest.created or None,
        )

    # Checks

    def verify(self) -> None:
        """Read everything and hold it against its checksums."""
        _ = self._device_bytes, self.description, self.bitmaps
        for pages in self._memory.values():
            pages.verify()
        for _, disk in self.disks:
            disk.verify()

    def _read(self, entry: m.FileEntry) -> bytes:
        """A small file, which must match its checksum."""
        path = self.path / entry.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise storage_error(path, "read", error) from None
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointDamaged(f"{path}: its content does not match its checksum")
        return data

    def _check_sizes(self) -> None:
        manifest = self.manifest
        files = [manifest.devices, manifest.description, manifest.bitmaps]
        expected = [(entry.file, entry.size) for entry in files if entry is not None]
        for pages, page_size in [(e, self.page_size) for e in manifest.ram] + [
            (e, DISK_CHUNK_SIZE) for e in manifest.disks
        ]:
            if pages.size % page_size or pages.sums.size != pages.size // page_size * 8:
                raise CheckpointDamaged(f"{self.path}: {pages.file}: sizes that do not fit")
            expected += [(pages.file, pages.size), (pages.sums.file, pages.sums.size)]
        for name, size in expected:
            try:
                found = (self.path / name).stat().st_size
            except OSError as error:
                raise storage_error(self.path / name, "found", error) from None
            if found != size:
                raise CheckpointDamaged(f"{self.path / name}: expected {size} bytes, found {found}")
        end = 0
        for section in manifest.sections:
            if section.offset != end:
                raise CheckpointDamaged(f"{self.path}: section {section.name}: out of place")
            end += section.size
        if manifest.sections and end != manifest.devices.size:
            raise CheckpointDamaged(f"{self.path}: {m.DEVICES} does not end with its last section")


def _parse_bitmaps(path: Path, data: bytes) -> list[BitmapRecord]:
    buffer = ReceiveBuffer(len(data) + 1)
    buffer.room()[: len(data)] = data
    buffer.received(len(data))
    buffer.received(0)
    reader = BitmapReader()
    records = []
    try:
        while buffer:
            records += [r for r in reader.body(Cursor(buffer)) if isinstance(r, BitmapRecord)]
    except StreamError as error:
        raise CheckpointDamaged(f"{path}: {error}") from None
    return records
