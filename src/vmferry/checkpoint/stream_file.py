"""Reading a stream file for its contents."""

from __future__ import annotations

import os
import re
import sys
from contextlib import AbstractContextManager, nullcontext
from io import BufferedReader
from pathlib import Path
from typing import Any, cast

import numpy as np

from vmferry.errors import StorageError, StreamError
from vmferry.wire.bitmap import BitmapRecord, BitmapsEnd, BitmapStart
from vmferry.wire.commands import Command, OpenReturnPath, Package, PostcopyAdvise
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection, split_by_footers
from vmferry.wire.disk import DiskChunk, DiskEnd
from vmferry.wire.foreign import ForeignPiece
from vmferry.wire.framed import Frame
from vmferry.wire.layout import DISK_CHUNK_SIZE
from vmferry.wire.ram import RamBlocks, RamEnd, RamPages
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.sections import SectionEnd, SectionFooter, SectionPart, SectionStart

from .survey import BlockTally, DiskSurvey, SectionSurvey, Survey

_LISTEN = 5
"""Bytes of the command that a package begins with."""


def open_stream(
    path: str | os.PathLike[str],
    *,
    max_ram: int | None = None,
    page_size: int | None = None,
    partial: bool = False,
) -> Survey:
    """Read the stream file *path* (``-`` for standard input) for its contents.

    Accepts streams without guest memory and without ends of sections.  A bad stream raises
    :class:`~vmferry.errors.StreamError`; with *partial* the contents up to there are returned, and
    the error in them.  *max_ram* and *page_size* as in :func:`vmferry.receive`.
    """
    surveyor = _Surveyor(os.fspath(path), max_ram=max_ram, page_size=page_size)
    try:
        with _opened(path) as file:
            surveyor.read(file)
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    except StreamError as error:
        if not partial:
            raise
        surveyor.survey.error = error
    return surveyor.finish()


def _opened(path: str | os.PathLike[str]) -> AbstractContextManager[BufferedReader]:
    if path != "-":
        return Path(path).open("rb")
    if sys.stdin is None:
        raise StorageError("standard input is closed")
    return nullcontext(cast(BufferedReader, sys.stdin.buffer))


def _command_name(command: Command) -> str:
    """``open-return-path`` for an OpenReturnPath."""
    return re.sub(r"\B(?=[A-Z])", "-", type(command).__name__).lower()


class _Surveyor:
    """Takes the events of one stream."""

    def __init__(self, source: str, *, max_ram: int | None, page_size: int | None) -> None:
        self.survey = Survey(source)
        self._reader = StreamReader(
            max_ram=max_ram,
            page_size=page_size,
            tolerate=Tolerate.NO_RAM | Tolerate.NO_END,
            framed=True,
        )
        self._tallies: dict[str, BlockTally] = {}
        self._features: set[str] = set()
        self._parts: dict[int, SectionSurvey] = {}
        self._heads: dict[int, SectionStart] = {}
        self._open: SectionSurvey | None = None
        self._open_from = 0

    def read(self, file: BufferedReader) -> None:
        """Read until the stream is complete, and count what stands behind it."""
        reader = self._reader
        while not reader.finished:
            # What is there, and no waiting for more than that: a pipe may stay open.
            reader.buffer.received(file.readinto1(reader.buffer.room()))
            for event in reader.events():
                self._take_from_main(event)
        self.survey.size = reader.buffer.offset
        self.survey.trailing = len(reader.buffer)
        if file.seekable():
            at = file.tell()
            self.survey.trailing += max(0, file.seek(0, os.SEEK_END) - at)

    def _take_from_main(self, event: Any) -> None:
        try:
            self._take(event)
        except StreamError as error:
            raise error.within(channel=self._reader.channel) from None

    def finish(self) -> Survey:
        """The contents."""
        survey = self.survey
        if survey.error is not None:
            self._close()
        survey.size = survey.size or self._reader.buffer.offset
        survey.page_size = self._reader.page_size
        survey.footers = bool(self._reader.footers)
        survey.blocks = [tally.survey() for tally in self._tallies.values()]
        if any(block.records["xbzrle"] for block in survey.blocks):
            self._features.add("xbzrle")
        if any(block.records["compressed"] for block in survey.blocks):
            self._features.add("compress")
        survey.capabilities = frozenset(self._features)
        return survey

    def _take(self, event: Any) -> None:
        match event:
            case RamPages():
                self._tallies[event.block.name].add(event)
            case SectionStart() | SectionPart() | SectionEnd():
                self._begin(event)
            case SectionFooter() | RamEnd() | DiskEnd() | BitmapsEnd() | ForeignPiece() | Frame():
                self._close()
            case DiskChunk() | BitmapRecord():
                self._take_disk(event)
            case DeviceSection() | DeviceRegion():
                self._device(event)
            case Command():
                self._command(event)
            case RamBlocks():
                size = self._reader.page_size
                for block in event.blocks:
                    states = np.zeros(block.length // size, np.uint8)
                    self._tallies[block.name] = BlockTally(block, states)
            case Configuration():
                self.survey.configuration = event
                self._features.update(event.capabilities)
                if event.uuid is not None:
                    self._features.add("validate-uuid")
            case VmDescription():
                self.survey.description = event

    def _take_disk(self, event: DiskChunk | BitmapRecord) -> None:
        if isinstance(event, BitmapStart):
            self._features.add("dirty-bitmaps")
            self.survey.bitmaps.append(event)
        elif isinstance(event, DiskChunk):
            self._features.add("block")
            disk = self.survey.disks.setdefault(event.disk, DiskSurvey())
            disk.chunks += 1
            disk.zero_chunks += event.data is None
            disk.size = max(disk.size, event.offset + DISK_CHUNK_SIZE)

    def _begin(self, event: SectionStart | SectionPart | SectionEnd) -> None:
        if isinstance(event, SectionStart):
            self._heads[event.number] = event
        head = self._heads[event.number]
        offset = self._reader.buffer.offset - len(event.encode())
        self._open_from = offset
        if isinstance(event, SectionPart) and event.number in self._parts:
            self._open = self._parts[event.number]
            self._open.count += 1
            return
        kind = type(event).__name__.removeprefix("Section").lower()
        self._open = SectionSurvey(
            kind, head.name, head.instance, head.version, head.number, offset
        )
        if isinstance(event, SectionPart):
            self._parts[event.number] = self._open
        self.survey.sections.append(self._open)

    def _close(self) -> None:
        # Whatever may be the last of a section extends it; a footer comes behind all of them.
        if self._open is not None:
            end = self._reader.buffer.offset
            self._open.size += end - self._open_from
            self._open_from = end

    def _device(self, section: DeviceSection | DeviceRegion) -> None:
        self._open = None
        self.survey.devices.append(section)
        if isinstance(section, DeviceSection):
            head = (section.name, section.instance, section.version, section.number)
            self.survey.sections.append(SectionSurvey("full", *head, section.offset, section.size))

    def _command(self, command: Command) -> None:
        self._open = None
        self.survey.commands[_command_name(command)] += 1
        match command:
            case OpenReturnPath():
                self._features.add("return-path")
            case PostcopyAdvise() if command.page_sizes is not None:  # else only for bitmaps
                self._features.add("postcopy-ram")
            case Package():
                inner = memoryview(command.content)[_LISTEN:]
                for section in split_by_footers(inner, command.offset + _LISTEN):
                    self._device(section)
