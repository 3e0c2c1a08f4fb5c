"""A file of pages with a sum for each: a RAM block, or a disk in pages of 1 MiB.

Zero pages are holes.  The sum of a page is its XXH64 (seed 0), and 0 for a zero page; it tells
damage from health page by page, so one page can be checked without reading the others.  It is no
protection against someone who means to deceive.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmferry.errors import storage_error
from vmferry.pages import Rows, store_records
from vmferry.pages.placing import place_rows

from .files import FileEntry, write_file

Sums = npt.NDArray[np.uint64]


class PageFile:
    """A file of *size* bytes in pages of *page_size*, being filled.

    Several threads may store pages at once, as long as no two store the same page.
    """

    def __init__(self, path: Path, size: int, page_size: int) -> None:
        self.path = path
        self.size = size
        self.page_size = page_size
        with ExitStack() as undo:
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                undo.callback(os.close, self._fd)
                os.ftruncate(self._fd, size)
            except OSError as error:
                raise storage_error(path, "created", error) from None
            self.sums: Sums = np.zeros(size // page_size, np.uint64)
            undo.pop_all()

    def grow(self, size: int) -> None:
        """Make the file *size* bytes long, with zeros."""
        if size <= self.size:
            return
        pages = size // self.page_size
        if pages > len(self.sums):
            # A chunk may lie far out: memory mapped like this is taken only where it is written.
            memory = mmap(-1, 8 * max(pages, 2 * len(self.sums)), MAP_PRIVATE | MAP_ANONYMOUS)
            sums = np.frombuffer(memory, np.uint64)
            used = np.flatnonzero(self.sums)
            sums[used] = self.sums[used]
            self.sums = sums
        try:
            os.ftruncate(self._fd, size)
        except OSError as error:
            raise storage_error(self.path, "enlarged", error) from None
        self.size = size

    def store(self, rows: Rows, data: memoryview) -> None:
        """Write the pages of *rows*, whose payloads lie in *data*.

        Raises :class:`StreamError` with the position in *data* as its offset.
        """
        place_rows(self._place, rows, data, self.page_size)

    def _place(self, rows: Rows, first: int, data: memoryview) -> int:
        done, error = store_records(self._fd, rows, first, data, self.page_size, self.sums)
        if error:
            raise storage_error(self.path, "written", error)
        return done

    def seal(self, sums: Path) -> FileEntry:
        """Make the file durable and write its sums beside it; returns the entry of those."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error(self.path, "written", error) from None
        table = self.sums[: self.size // self.page_size].astype("<u8", copy=False)
        return write_file(sums, table.view(np.uint8).data)

    @property
    def data_pages(self) -> int:
        """Pages that are not zero."""
        return int(np.count_nonzero(self.sums))

    def close(self) -> None:
        """Give the file back; what counts was made durable before."""
        with suppress(OSError):
            os.close(self._fd)
