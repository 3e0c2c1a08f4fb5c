"""Writing a checkpoint directory while a machine is received.

Until :meth:`CheckpointWriter.commit` has renamed the manifest into place the directory opens as
incomplete; a crash at any moment leaves it so, and a failure removes it.  What is committed opens:
it was read back as a stranger's would be.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from vmferry.errors import LimitExceeded, StorageError, StreamError, storage_error
from vmferry.pages import PAGE, ZERO, rows_of
from vmferry.version import __version__
from vmferry.wire import limits
from vmferry.wire.bitmap import BitmapRecord, BitmapsEnd, BitmapStart
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.disk import DiskChunk
from vmferry.wire.layout import DISK_CHUNK_SIZE, IGNORE_SHARED, BitmapFlag
from vmferry.wire.ram import RamBlock, RamBlocks, RamPages

from . import manifest as m
from .files import FileEntry, sync_directory, write_file
from .manifest_reader import parse_manifest
from .pages import PageFile

MAX_DISKS: Final = 64 << 40
"""Bytes of all disks: more than anyone sends in a stream, few enough to keep a sum for each MiB."""

_BOTH_NAMES: Final = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME


class CheckpointWriter:
    """Fills the new directory *path*; a context manager, which removes what was not committed.

    It is a :class:`vmferry.migration.sink.Sink`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._configuration: Configuration | None = None
        self._page_size = 0
        self._ram: dict[str, tuple[RamBlock, PageFile]] = {}
        self._touched: set[str] = set()
        self._disks: dict[str, PageFile] = {}
        self._sections: list[m.SectionEntry] = []
        self._devices = bytearray()
        self._description: bytes | None = None
        self._bitmap_starts = bytearray()
        self._bitmap_bits = bytearray()
        self._existed = False
        self._committed = False

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            try:
                self._existed = self.path.exists()
                if self._existed and (not self.path.is_dir() or any(self.path.iterdir())):
                    raise StorageError(f"{self.path}: exists already; choose a new directory")
                if not self._existed:
                    self.path.mkdir(mode=0o700)
                    undo.callback(_try, self.path.rmdir)
                (self.path / m.PARTIAL).touch(mode=0o600, exist_ok=False)
                undo.callback(_try, (self.path / m.PARTIAL).unlink)
                self._make_name_durable()
            except OSError as error:
                raise storage_error(self.path, "created", error) from None
            undo.pop_all()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for file in self._files():
            file.close()
        if not self._committed:
            self._remove()

    def _make_name_durable(self) -> None:
        with suppress(PermissionError):  # a directory may be writable and not readable
            sync_directory(self.path.absolute().parent)

    def _remove(self) -> None:
        """Remove everything; while anything is left the directory opens as incomplete."""
        # First of all what would make it look complete, should it be there already.
        _try((self.path / m.NAME).rename, self.path / m.PARTIAL)
        for folder in ("ram", "disks"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in (m.DEVICES, m.DESCRIPTION, m.BITMAPS):
            _try((self.path / name).unlink)
        with suppress(OSError):
            if {entry.name for entry in self.path.iterdir()} == {m.PARTIAL}:
                (self.path / m.PARTIAL).unlink()
                if not self._existed:
                    self.path.rmdir()

    def _files(self) -> list[PageFile]:
        return [file for _, file in self._ram.values()] + list(self._disks.values())

    # What a sink takes

    def configuration(self, configuration: Configuration | None, page_size: int) -> None:
        """The machine, and the size of its pages in bytes."""
        self._configuration = configuration
        self._page_size = page_size

    def ram_blocks(self, blocks: RamBlocks) -> None:
        """Create a file for each block."""
        self._make(self.path / "ram")
        for block in blocks.blocks:
            path = self.path / "ram" / f"{_file_name(len(self._ram), block.name)}.raw"
            self._ram[block.name] = block, PageFile(path, block.length, self._page_size)

    def pages(self, batch: RamPages) -> None:
        """Store pages; may be called by several threads at once."""
        _, file = self._ram[batch.block.name]
        self._touched.add(batch.block.name)
        try:
            file.store(batch.rows, batch.data)
        except StreamError as error:
            error.place = replace(error.place, offset=batch.start + (error.place.offset or 0))
            raise error.within(section="ram", block=batch.block.name) from None

    def disk_chunk(self, chunk: DiskChunk) -> None:
        """Store 1 MiB of a disk; zeros become a hole."""
        file = self._disks.get(chunk.disk)
        others = sum(disk.size for disk in self._disks.values() if disk is not file)
        if chunk.offset > MAX_DISKS - others - DISK_CHUNK_SIZE:
            raise LimitExceeded(
                f"at most {MAX_DISKS} bytes of disks",
                f"a chunk at {chunk.offset:#x} of one, beside {others} bytes of others",
                section="block",
                block=chunk.disk,
            )
        if file is None:
            self._make(self.path / "disks")
            path = self.path / "disks" / f"{_file_name(len(self._disks), chunk.disk)}.raw"
            file = self._disks[chunk.disk] = PageFile(path, 0, DISK_CHUNK_SIZE)
        file.grow(chunk.offset + DISK_CHUNK_SIZE)
        kind, length = (ZERO, 1) if chunk.data is None else (PAGE, DISK_CHUNK_SIZE)
        rows = rows_of(np.array([chunk.offset | kind], np.uint64), np.zeros(1, np.uint64), length)
        file.store(rows, memoryview(chunk.data or b""))

    def bitmap(self, record: BitmapRecord) -> None:
        """Keep a piece of a dirty bitmap."""
        # With its names, as its neighbours will be others.
        data = replace(record, names_sent=_BOTH_NAMES).encode()
        kept = self._bitmap_starts if isinstance(record, BitmapStart) else self._bitmap_bits
        if len(self._bitmap_starts) + len(self._bitmap_bits) + len(data) > m.MAX_BITMAPS - 2:
            most = f"at most {m.MAX_BITMAPS} bytes of dirty bitmaps"
            raise LimitExceeded(most, "more", section="dirty-bitmap", block=record.node)
        kept += data

    def device(self, section: DeviceSection | DeviceRegion, *, early: bool) -> None:
        """Keep a device's section as it came, or all of them where nothing tells them apart."""
        data = section.encode()
        offset = len(self._devices)
        if offset + len(data) > limits.DEVICES or len(self._sections) == limits.DEVICE_COUNT:
            raise LimitExceeded(
                f"at most {limits.DEVICE_COUNT} devices and {limits.DEVICES} bytes of them",
                "more",
                section=section.name,
                offset=section.offset,
            )
        if isinstance(section, DeviceSection):
            identity = section.name, section.instance, section.version, section.number
            self._sections.append(m.SectionEntry(*identity, offset, len(data), early))
        self._devices += data

    def description(self, description: VmDescription) -> None:
        """Keep the closing description as it came."""
        self._description = description.text

    def commit(self, features: frozenset[str], *, footers: bool) -> None:
        """Make everything durable and rename the manifest into place."""
        configuration = self._configuration or Configuration("")
        described = self._description
        manifest = m.Manifest(
            machine=configuration.machine or None,
            page_size=self._page_size,
            footers=footers,
            ram=tuple(self._ram_entry(*entry) for entry in self._ram.values()),
            sections=tuple(self._sections),
            devices=write_file(self.path / m.DEVICES, self._devices),
            description=write_file(self.path / m.DESCRIPTION, described) if described else None,
            disks=tuple(self._disk_entry(name, file) for name, file in self._disks.items()),
            bitmaps=self._write_bitmaps(),
            page_bits=configuration.page_bits,
            uuid=str(configuration.uuid) if configuration.uuid else None,
            capabilities=tuple(sorted(features)),
            stream_capabilities=configuration.capabilities,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            writer=f"vmferry {__version__}",
        )
        text = manifest.to_json().encode()
        parse_manifest(text, str(self.path / m.NAME))
        try:
            _publish(self.path, text)
        except OSError as error:
            raise storage_error(self.path, "completed", error) from None
        self._committed = True

    def discard(self) -> None:
        """Take back what was committed; the end of the ``with`` block removes it."""
        self._committed = False

    def _make(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise storage_error(directory, "created", error) from None

    def _ram_entry(self, block: RamBlock, file: PageFile) -> m.RamEntry:
        capabilities = self._configuration.capabilities if self._configuration else ()
        sums, relative = self._seal(file)
        return m.RamEntry(
            name=block.name,
            size=block.length,
            file=relative,
            sums=sums,
            data_pages=file.data_pages,
            zero_pages=len(file.sums) - file.data_pages,
            page_size=block.page_size,
            address=block.address,
            ignored=IGNORE_SHARED in capabilities and block.name not in self._touched,
        )

    def _disk_entry(self, name: str, file: PageFile) -> m.DiskEntry:
        sums, relative = self._seal(file)
        return m.DiskEntry(name, file.size, relative, sums)

    def _seal(self, file: PageFile) -> tuple[FileEntry, str]:
        sums = file.seal(file.path.with_suffix(".sums"))
        folder = file.path.parent.name
        return replace(sums, file=f"{folder}/{sums.file}"), f"{folder}/{file.path.name}"

    def _write_bitmaps(self) -> FileEntry | None:
        if not self._bitmap_starts:
            return None
        end = BitmapsEnd().encode()
        data = self._bitmap_starts + end + self._bitmap_bits + end
        return write_file(self.path / m.BITMAPS, data)


def _file_name(index: int, name: str) -> str:
    """A name for the file of *name*, which may hold anything; the index keeps it apart."""
    return f"{index:02}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[:48]}"


def _publish(directory: Path, text: bytes) -> None:
    """Write the manifest aside, make every name in the directory durable, rename it into place."""
    partial = directory / m.PARTIAL
    with partial.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    for path in (directory / "ram", directory / "disks", directory):
        if path.is_dir():
            sync_directory(path)
    partial.rename(directory / m.NAME)
    sync_directory(directory)


def _try(step: Callable[..., object], *arguments: object) -> None:
    """Take a step of which nothing depends."""
    with suppress(OSError):
        step(*arguments)
