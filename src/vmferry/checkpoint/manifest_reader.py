"""Reading a manifest as if a stranger had written it: every name, size and count is checked.

What :func:`parse_manifest` returns can be used as it is: names can stand in a stream, numbers fit
their fields, files lie in the directory and sizes fit each other.  Whether the files are as the
manifest says is another question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

from vmferry.errors import CheckpointDamaged, CheckpointIncomplete, StorageError, storage_error
from vmferry.wire import limits
from vmferry.wire.layout import DISK_CHUNK_SIZE

from . import manifest as m
from .files import FileEntry, read_inside

_U32: Final = (1 << 32) - 1
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = 255
_SUM: Final = 8
"""Bytes of the sum of a page."""

T = TypeVar("T")


def read_manifest(directory: Path) -> m.Manifest:
    """The manifest of *directory*; raises :class:`StorageError` where there is no good one."""
    path = directory / m.NAME
    try:
        text = read_inside(directory, m.NAME, m.MAX_SIZE)
    except FileNotFoundError:
        raise _missing(directory) from None
    except OSError as error:
        raise storage_error(path, "read", error) from None
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, where: str) -> m.Manifest:
    """The manifest in *text*; *where* names it in errors."""
    if len(text) > m.MAX_SIZE:
        raise CheckpointDamaged(f"{where}: larger than any manifest")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointDamaged(f"{where}: not JSON: {error}") from None
    return _Reader(where, content).manifest()


def _missing(directory: Path) -> StorageError:
    if (directory / m.PARTIAL).exists():
        return CheckpointIncomplete(
            f"{directory}: incomplete: whoever wrote it did not finish; receive the machine again"
        )
    if not directory.is_dir():
        return StorageError(f"{directory}: no such checkpoint directory")
    return StorageError(f"{directory}: not a checkpoint: there is no {m.NAME} in it")


class _Reader:
    """Takes values out of parsed JSON, each checked for its type; errors name the place."""

    def __init__(self, where: str, value: Any) -> None:
        self._where = where
        if not isinstance(value, dict):
            raise CheckpointDamaged(f"{where}: expected an object, found {type(value).__name__}")
        self._value: dict[str, Any] = value

    # Objects

    def manifest(self) -> m.Manifest:
        if self._value.get("format") != m.FORMAT:
            raise CheckpointDamaged(f"{self._where}: not the manifest of a vmferry checkpoint")
        version = self._value.get("version")
        if version != m.VERSION or isinstance(version, bool):
            raise StorageError(
                f"{self._where}: expected format version {m.VERSION}, found {_shown(version)};"
                " a newer vmferry wrote it"
            )
        page_size = self.power("page_size", 1024, 65536)
        manifest = m.Manifest(
            machine=self.optional("machine", self.name),
            page_size=page_size,
            footers=self.boolean("footers"),
            ram=self.each("ram", lambda entry: entry.ram(page_size), limits.RAM_BLOCKS),
            sections=self.each("sections", _Reader.section, limits.DEVICE_COUNT),
            devices=self.small("devices", limits.DEVICES),
            description=self.optional(
                "description", lambda key: self.small(key, limits.DESCRIPTION)
            ),
            disks=self.each("disks", _Reader.disk, limits.DISKS),
            bitmaps=self.optional("bitmaps", lambda key: self.small(key, m.MAX_BITMAPS)),
            page_bits=self.optional("page_bits", lambda key: self.number(key, 16)),
            uuid=self.optional("uuid", self.uuid),
            capabilities=self.names("capabilities", 2 * limits.CAPABILITIES),
            stream_capabilities=self.names("stream_capabilities", limits.CAPABILITIES),
            created=self.text("created"),
            writer=self.text("writer"),
        )
        self.check(manifest)
        return manifest

    def check(self, manifest: m.Manifest) -> None:
        """Hold against each other what several values say."""
        if manifest.page_bits is not None and 1 << manifest.page_bits != manifest.page_size:
            raise self.wrong("page_bits", f"those of {manifest.page_size}", manifest.page_bits)
        for key, entries in (("ram", manifest.ram), ("disks", manifest.disks)):
            names = [entry.name for entry in entries]
            if len(set(names)) != len(names):
                raise self.wrong(key, "each name once", names)
        end = 0
        for section in manifest.sections:
            if section.offset != end:
                place = f"section {section.name} at {end}"
                raise self.wrong("sections", place, section.offset)
            end += section.size
        if manifest.sections and end != manifest.devices.size:
            raise self.wrong("sections", f"the last to end at {manifest.devices.size}", end)

    def ram(self, page_size: int) -> m.RamEntry:
        entry = m.RamEntry(
            name=self.name("name"),
            size=self.size(page_size),
            file=self.path("file"),
            sums=self.sums(page_size),
            data_pages=self.number("data_pages"),
            zero_pages=self.number("zero_pages"),
            page_size=self.optional("page_size", lambda key: self.power(key, 1024, 1 << 40)),
            address=self.optional("address", self.number),
            ignored=self.boolean("ignored"),
        )
        pages = entry.size // page_size
        if entry.data_pages + entry.zero_pages != pages:
            raise self.wrong("zero_pages", f"{pages} pages with data_pages", entry.zero_pages)
        return entry

    def disk(self) -> m.DiskEntry:
        return m.DiskEntry(
            name=self.name("name"),
            size=self.size(DISK_CHUNK_SIZE),
            file=self.path("file"),
            sums=self.sums(DISK_CHUNK_SIZE),
        )

    def section(self) -> m.SectionEntry:
        return m.SectionEntry(
            name=self.name("name"),
            instance=self.number("instance", _U32),
            version=self.number("version", _U32),
            number=self.number("number", _U32),
            offset=self.number("offset"),
            size=self.number("size"),
            early=self.boolean("early"),
        )

    def file(self) -> FileEntry:
        digest = self._value.get("sha256")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise self.wrong("sha256", "64 hexadecimal digits", digest)
        return FileEntry(self.path("file"), self.number("size"), digest)

    def small(self, key: str, most: int) -> FileEntry:
        """A file that is read whole."""
        entry = self.child(key, _Reader.file)
        if entry.size > most:
            raise self.wrong(key, f"a file of at most {most} bytes", entry.size)
        return entry

    def sums(self, page_size: int) -> FileEntry:
        """The file with the sums of the pages of this object."""
        entry = self.child("sums", _Reader.file)
        size = self.number("size") // page_size * _SUM
        if entry.size != size:
            raise self.wrong("sums", f"a file of {size} bytes, one sum a page", entry.size)
        return entry

    # Values

    def number(self, key: str, most: int = (1 << 63) - 1) -> int:
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self.wrong(key, f"a number from 0 to {most}", value)
        return value

    def size(self, page_size: int) -> int:
        size = self.number("size")
        if size == 0 or size % page_size:
            raise self.wrong("size", f"one or more pages of {page_size} bytes", size)
        return size

    def power(self, key: str, least: int, most: int) -> int:
        value = self.number(key)
        if not least <= value <= most or value & (value - 1):
            raise self.wrong(key, f"a power of two from {least} to {most}", value)
        return value

    def text(self, key: str) -> str:
        value = self._value.get(key)
        if not _is_text(value):
            raise self.wrong(key, f"a printable text of at most {_NAME} bytes", value)
        return str(value)

    def name(self, key: str) -> str:
        value = self.text(key)
        if not value:
            raise self.wrong(key, "a name", value)
        return value

    def names(self, key: str, most: int) -> tuple[str, ...]:
        value = self._value.get(key)
        if (
            not isinstance(value, list)
            or len(value) > most
            or not all(item and _is_text(item) for item in value)
        ):
            raise self.wrong(key, f"a list of at most {most} names", value)
        return tuple(value)

    def uuid(self, key: str) -> str:
        value = self.text(key)
        try:
            return str(UUID(value))
        except ValueError:
            raise self.wrong(key, "a UUID", value) from None

    def path(self, key: str) -> str:
        value = self.text(key)
        parts = value.split("/")
        if len(parts) > 2 or not all(part and part not in {".", ".."} for part in parts):
            raise self.wrong(key, "the name of a file inside the directory", value)
        return value

    def boolean(self, key: str) -> bool:
        value = self._value.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

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
        return CheckpointDamaged(
            f"{self._where}: {key}: expected {expected}, found {_shown(found)}"
        )


def _is_text(value: object) -> bool:
    # Printable leaves out lone surrogates, which JSON can spell and UTF-8 cannot.
    return isinstance(value, str) and value.isprintable() and len(value.encode()) <= _NAME


def _shown(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:59] + "…"
