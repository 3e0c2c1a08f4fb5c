"""A file of pages with a sum for each: a RAM block, or a disk in pages of 1 MiB.

Zero pages are holes.  The sum of a page is its XXH64 (seed 0), and 0 for a zero page; it tells
damage from health page by page, so one page can be checked without reading the others.  It is no
protection against someone who means to deceive.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vmferry.errors import StreamError
from vmferry.pages import COMPRESS, KINDS, PAGE, XBZRLE, Rows, rows_of, store_records
from vmferry.pages.compression import inflate_page

from .files import FileEntry, storage_error, write_file

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
            sums = np.zeros(max(pages, 2 * len(self.sums)), np.uint64)
            sums[: len(self.sums)] = self.sums
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
        done = 0
        while done < len(rows):
            done, error = store_records(self._fd, rows, done, data, self.page_size, self.sums)
            if error:
                raise storage_error(self.path, "written", error)
            if done < len(rows):
                done = self._inflate(rows, done, data)

    def _inflate(self, rows: Rows, first: int, data: memoryview) -> int:
        """Store the compressed pages at *first*; whatever else stands there is broken."""
        kinds = rows["word"][first:] & np.uint64(KINDS & (self.page_size - 1))
        others = np.flatnonzero(kinds != COMPRESS)
        stop = first + (int(others[0]) if len(others) else len(kinds))
        if stop == first:
            raise StreamError(
                "an XBZRLE page whose runs fit" if kinds[0] == XBZRLE else "a page in its block",
                "one that overruns",
                offset=int(rows["position"][first]),
            )
        pages = [self._inflated(row, data) for row in rows[first:stop].tolist()]
        words = (rows["word"][first:stop] & ~np.uint64(self.page_size - 1)) | np.uint64(PAGE)
        positions = np.arange(len(pages), dtype=np.uint64) * np.uint64(self.page_size)
        self.store(rows_of(words, positions, self.page_size), memoryview(b"".join(pages)))
        return stop

    def _inflated(self, row: tuple[int, int, int, int], data: memoryview) -> bytes:
        _, position, length, _ = row
        try:
            return inflate_page(data[position : position + length], self.page_size)
        except StreamError as error:
            raise error.within(offset=position) from None

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
