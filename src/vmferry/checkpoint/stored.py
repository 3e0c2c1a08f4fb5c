"""The pages of a RAM block or disk in a checkpoint, to be read and held against their sums."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from vmferry.errors import CheckpointDamaged, storage_error
from vmferry.pages import page_sums

from .files import open_inside
from .pages import Sums

_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""How many pieces the kernel fills in one call."""

_CHUNK: Final = 1 << 20
"""Bytes read at once when a file is gone through."""


class StoredPages:
    """The pages of a RAM block or disk in a checkpoint; a ``PageStore`` of a source."""

    def __init__(
        self, directory: Path, name: str, size: int, page_size: int, sums: Callable[[], Sums]
    ) -> None:
        self.path = directory / name
        self.size = size
        self.page_size = page_size
        self._load_sums = sums
        try:
            self._fd = open_inside(directory, name)
        except OSError as error:
            raise storage_error(self.path, "opened", error) from None

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

    def data_from(self, offset: int) -> tuple[int, int] | None:
        """The first stretch from *offset* on that is no hole, as bytes from and to."""
        try:
            start = os.lseek(self._fd, offset, os.SEEK_DATA)
            return start, os.lseek(self._fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                self._check_whole()  # what was cut off is no hole
                return None
            raise storage_error(self.path, "read", error) from None

    def _check_whole(self) -> None:
        if os.fstat(self._fd).st_size < self.size:
            raise CheckpointDamaged(f"{self.path}: shorter than {self.size} bytes")

    def verify(self) -> None:
        """Hold every page against its sum; holes are not read."""
        step = max(_CHUNK // self.page_size, 1)
        buffer = memoryview(bytearray(step * self.page_size))
        found = np.zeros(step, np.uint64)
        at = 0
        while at < len(self.sums):
            data = self._next_data(at)
            self._compare(at, self.sums[at:data], np.zeros(1, np.uint64))
            if data == len(self.sums):
                return
            expected = self.sums[data : data + step]
            piece = buffer[: len(expected) * self.page_size]
            self.read(data * self.page_size, piece)
            page_sums(piece, self.page_size, found)
            self._compare(data, expected, found[: len(expected)])
            at = data + step

    def _next_data(self, page: int) -> int:
        """The first page from *page* on that is not in a hole."""
        found = self.data_from(page * self.page_size)
        return len(self.sums) if found is None else found[0] // self.page_size

    def _compare(self, first: int, expected: Sums, found: Sums) -> None:
        wrong = np.flatnonzero(expected != found)
        if len(wrong):
            raise CheckpointDamaged(
                f"{self.path}: the page at {(first + int(wrong[0])) * self.page_size:#x} is"
                " damaged: its content does not match its sum"
            )

    def close(self) -> None:
        """Give the file back; what is read later is an error."""
        descriptor, self._fd = self._fd, -1
        if descriptor >= 0:
            os.close(descriptor)
