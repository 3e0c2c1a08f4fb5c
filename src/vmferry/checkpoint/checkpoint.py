"""A checkpoint directory, opened: its parts, checked when they are used.

Opening reads the manifest and looks at the sizes of the files, whatever the size of the machine;
:meth:`Checkpoint.verify` reads everything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from uuid import UUID

import numpy as np

from vmferry.errors import CheckpointDamaged, StorageError, StreamError, storage_error
from vmferry.wire.bitmap import BitmapReader, BitmapRecord, BitmapStart
from vmferry.wire.buffer import Cursor, ReceiveBuffer
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription, parse_description
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.layout import DISK_CHUNK_SIZE, Kind
from vmferry.wire.ram import RamBlock
from vmferry.wire.reader import physical_memory
from vmferry.wire.sections import SectionFooter, SectionStart

from . import manifest as m
from .files import FileEntry, open_inside, read_inside
from .manifest_reader import read_manifest
from .pages import Sums
from .stored import StoredPages
from .survey import BlockSurvey, DiskSurvey, SectionSurvey, Survey

if TYPE_CHECKING:
    from vmferry.migration.postcopy.source import LazyOptions
    from vmferry.qemu.qmp import Qmp

    from .restore import Restored

_SECTOR: Final = 512
"""What the file system counts in, whatever its own blocks are."""


class Checkpoint:
    """A saved machine: a directory written by ``vmferry receive``.

    A context manager; the files of guest memory stay open until it is left.  Raises
    :class:`StorageError` where the directory is missing, incomplete or does not fit its manifest.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = False) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._disk_usage = self._check_sizes()
        self._open = ExitStack()
        if verify:
            try:
                self.verify()
            except BaseException:
                self.close()
                raise

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

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

    def serve(
        self, uri: str, *, qmp: Qmp | None = None, options: LazyOptions | None = None
    ) -> Restored:
        """Run the machine at once in what waits at *uri*; return when it has all of its memory.

        See :class:`~vmferry.checkpoint.restore.Restore`, which can do more and be cancelled.
        """
        from .restore import Restore  # noqa: PLC0415 - they need each other

        return Restore(self, uri, qmp=qmp, options=options).run()

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

        pages = StoredPages(self.path, entry.file, entry.size, page_size, sums)
        self._open.callback(pages.close)
        return pages

    @property
    def bitmaps(self) -> Iterator[BitmapRecord]:
        """Dirty bitmaps, as the records of their section, read anew each time."""
        entry = self.manifest.bitmaps
        return iter(()) if entry is None else _parse_bitmaps(self.path, self._read(entry))

    # Devices

    @cached_property
    def _device_bytes(self) -> bytes:
        return self._read(self.manifest.devices)

    def _slices(self, *, early: bool) -> list[bytes]:
        if not self.manifest.sections and not early:
            return [self._device_bytes]
        return [
            section.encode()
            for entry, section in zip(self.manifest.sections, self.device_sections, strict=False)
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
        fits = len(whole) >= len(head) + len(foot)
        if not fits or not whole.startswith(head) or not whole.endswith(foot):
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
        return Survey(
            source=str(self.path),
            size=self._disk_usage,
            configuration=self.configuration,
            page_size=self.page_size,
            footers=self.footers,
            capabilities=frozenset(manifest.capabilities),
            blocks=blocks,
            sections=sections,
            disks=disks,
            bitmaps=[record for record in self.bitmaps if isinstance(record, BitmapStart)],
            devices=list(self.device_sections),
            description=self._parse_description(),
            created=manifest.created or None,
        )

    def _parse_description(self) -> VmDescription | None:
        if self.description is None:
            return None
        try:
            return parse_description(self.description)
        except StreamError as error:
            raise CheckpointDamaged(f"{self.path / m.DESCRIPTION}: {error}") from None

    # Checks

    def verify(self) -> None:
        """Read everything and hold it against its checksums."""
        _ = self.device_sections, self._parse_description()
        for _ in self.bitmaps:
            pass
        for entry in self.manifest.ram:
            pages = self._memory.get(entry.name)
            if pages is None:
                continue
            pages.verify()
            if np.count_nonzero(pages.sums) != entry.data_pages:
                raise CheckpointDamaged(
                    f"{pages.path}: expected {entry.data_pages} pages with data, found"
                    f" {np.count_nonzero(pages.sums)}"
                )
        for _, disk in self.disks:
            disk.verify()

    def _read(self, entry: FileEntry) -> bytes:
        """A file that is read whole, and must match its checksum."""
        path = self.path / entry.file
        if entry.size > physical_memory():
            raise StorageError(f"{path}: {entry.size} bytes are more than this machine can hold")
        try:
            data = read_inside(self.path, entry.file, entry.size)
        except OSError as error:
            raise storage_error(path, "read", error) from None
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointDamaged(f"{path}: its content does not match its checksum")
        return data

    def _check_sizes(self) -> int:
        """Hold the size of every file against the manifest; how much they take on disk."""
        manifest = self.manifest
        files = [manifest.devices, manifest.description, manifest.bitmaps]
        expected = [(entry.file, entry.size) for entry in files if entry is not None]
        stored: tuple[m.RamEntry | m.DiskEntry, ...] = (*manifest.ram, *manifest.disks)
        for pages in stored:
            expected += [(pages.file, pages.size), (pages.sums.file, pages.sums.size)]
        usage = self._usage(m.NAME, None)
        return usage + sum(self._usage(name, size) for name, size in expected)

    def _usage(self, name: str, size: int | None) -> int:
        path = self.path / name
        try:
            descriptor = open_inside(self.path, name)
        except OSError as error:
            raise storage_error(path, "opened", error) from None
        try:
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if size is not None and found.st_size != size:
            raise CheckpointDamaged(f"{path}: expected {size} bytes, found {found.st_size}")
        return found.st_blocks * _SECTOR


def _parse_bitmaps(directory: Path, data: bytes) -> Iterator[BitmapRecord]:
    buffer = ReceiveBuffer(len(data) + 1)
    buffer.room()[: len(data)] = data
    buffer.received(len(data))
    buffer.received(0)
    reader = BitmapReader()
    try:
        while buffer:
            for record in reader.body(Cursor(buffer)):
                if isinstance(record, BitmapRecord):
                    yield record
    except StreamError as error:
        raise CheckpointDamaged(f"{directory / m.BITMAPS}: {error}") from None
