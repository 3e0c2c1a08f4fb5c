"""The manifest of a checkpoint: what the directory holds, and the checksum of each file.

The directory is complete once ``manifest.json`` is in it; while it is being written there is
``manifest.json.partial`` instead.  A manifest is read as if a stranger had written it: every name,
size and count is checked before use.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from vmferry.errors import CheckpointDamaged, CheckpointIncomplete, StorageError
from vmferry.wire import limits

NAME: Final = "manifest.json"
PARTIAL: Final = "manifest.json.partial"
DEVICES: Final = "devices.bin"
DESCRIPTION: Final = "description.json"
BITMAPS: Final = "bitmaps.bin"

FORMAT: Final = "vmferry checkpoint"
VERSION: Final = 1
_MAX_SIZE: Final = 64 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the directory: its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    size: int
    sha256: str


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


def read_manifest(directory: Path) -> Manifest:
    """The manifest of *directory*; raises :class:`StorageError` where there is no good one."""
    path = directory / NAME
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_SIZE + 1)
    except FileNotFoundError:
        raise _missing(directory) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > _MAX_SIZE:
        raise CheckpointDamaged(f"{path}: larger than any manifest")
    try:
        return _Reader(str(path), json.loads(text)).manifest()
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{path}: not JSON: {error}") from None


def _missing(directory: Path) -> StorageError:
    if (directory / PARTIAL).exists():
        return CheckpointIncomplete(
            f"{directory}: incomplete: whoever wrote it did not finish; receive the machine again"
        )
    if not directory.is_dir():
        return StorageError(f"{directory}: no such checkpoint directory")
    return StorageError(f"{directory}: not a checkpoint: there is no {NAME} in it")


class _Reader:
    """Takes values out of parsed JSON, each checked for its type; errors name the place."""

    def __init__(self, where: str, value: Any) -> None:
        self._where = where
        if not isinstance(value, dict):
            raise CheckpointDamaged(f"{where}: expected an object, found {type(value).__name__}")
        self._value: dict[str, Any] = value

    def manifest(self) -> Manifest:
        if self._value.get("format") != FORMAT:
            raise CheckpointDamaged(f"{self._where}: not the manifest of a vmferry checkpoint")
        version = self._value.get("version")
        if version != VERSION:
            raise StorageError(
                f"{self._where}: expected format version {VERSION}, found {version!r};"
                " a newer vmferry wrote it"
            )
        return Manifest(
            machine=self.optional("machine", self.text),
            page_size=self.page_size(),
            footers=self.boolean("footers"),
            ram=self.each("ram", _Reader.ram, limits.RAM_BLOCKS),
            sections=self.each("sections", _Reader.section, 1 << 16),
            devices=self.child("devices", _Reader.file),
            description=self.optional("description", lambda key: self.child(key, _Reader.file)),
            disks=self.each("disks", _Reader.disk, limits.DISKS),
            bitmaps=self.optional("bitmaps", lambda key: self.child(key, _Reader.file)),
            page_bits=self.optional("page_bits", self.number),
            uuid=self.optional("uuid", self.text),
            capabilities=self.texts("capabilities"),
            stream_capabilities=self.texts("stream_capabilities"),
            created=self.text("created"),
            writer=self.text("writer"),
        )

    def page_size(self) -> int:
        size = self.number("page_size")
        if not 1024 <= size <= 65536 or size & (size - 1):
            raise self.wrong("page_size", "a power of two from 1024 to 65536", size)
        return size

    def ram(self) -> RamEntry:
        return RamEntry(
            name=self.text("name"),
            size=self.number("size"),
            file=self.path("file"),
            sums=self.child("sums", _Reader.file),
            data_pages=self.number("data_pages"),
            zero_pages=self.number("zero_pages"),
            page_size=self.optional("page_size", self.number),
            address=self.optional("address", self.number),
            ignored=self.boolean("ignored"),
        )

    def disk(self) -> DiskEntry:
        return DiskEntry(
            name=self.text("name"),
            size=self.number("size"),
            file=self.path("file"),
            sums=self.child("sums", _Reader.file),
        )

    def section(self) -> SectionEntry:
        return SectionEntry(
            name=self.text("name"),
            instance=self.number("instance"),
            version=self.number("version"),
            number=self.number("number"),
            offset=self.number("offset"),
            size=self.number("size"),
            early=self.boolean("early"),
        )

    def file(self) -> FileEntry:
        return FileEntry(self.path("file"), self.number("size"), self.text("sha256"))

    def number(self, key: str) -> int:
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
            raise self.wrong(key, "a number from 0 to 2^63 - 1", value)
        return value

    def text(self, key: str) -> str:
        value = self._value.get(key)
        if not isinstance(value, str) or len(value) > 4096:
            raise self.wrong(key, "a text of at most 4096 characters", value)
        return value

    def path(self, key: str) -> str:
        value = self.text(key)
        parts = value.split("/")
        if len(parts) > 2 or any(part in {"", ".", ".."} or "\0" in part for part in parts):
            raise self.wrong(key, "the name of a file inside the directory", value)
        return value

    def boolean(self, key: str) -> bool:
        value = self._value.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._value.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of texts", value)
        return tuple(value)

    def optional(self, key: str, read: Callable[[str], T]) -> T | None:
        return None if self._value.get(key) is None else read(key)

    def child(self, key: str, read: Callable[[_Reader], T]) -> T:
        return read(_Reader(f"{self._where}: {key}", self._value.get(key)))

    def each(self, key: str, read: Callable[[_Reader], T], most: int) -> tuple[T, ...]:
        value = self._value.get(key)
        if not isinstance(value, list) or len(value) > most:
            raise self.wrong(key, f"a list of at most {most}", value)
        return tuple(
            read(_Reader(f"{self._where}: {key}[{index}]", item))
            for index, item in enumerate(value)
        )

    def wrong(self, key: str, expected: str, found: object) -> CheckpointDamaged:
        shown = repr(found)
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        return CheckpointDamaged(f"{self._where}: {key}: expected {expected}, found {shown}")
