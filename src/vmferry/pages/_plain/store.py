"""Pages into the file of their RAM block."""

from __future__ import annotations

import errno
import os

import numpy as np

from vmferry.pages.rows import COMPRESS, KINDS, PAGE, ZERO, Rows

from .records import is_sound
from .sums import page_sums
from .types import U64, Bytes
from .xbzrle import xbzrle_decode


def store_records(
    fd: int, rows: Rows, first: int, data: Bytes, page_size: int, sums: U64
) -> tuple[int, int]:
    """Write the pages of ``rows[first:]`` into the file of their RAM block, and their *sums*.

    A zero page becomes a hole.  Returns the first row not done and an errno: stops with 0 before a
    row that it cannot do (a compressed page, an XBZRLE record that breaks a rule, a row that is no
    page record or points outside the data or the block).  With another errno, rows behind the first
    may have been done too, or in part.
    """
    for index in range(first, len(rows)):
        word, position, length, _ = rows[index].tolist()
        offset = word & -page_size
        number = offset // page_size
        kind = word & KINDS
        if number >= len(sums) or not is_sound(word, position, length, len(data), page_size):
            return index, 0
        try:
            page = _page_of(fd, kind, offset, data[position : position + length], page_size)
            if page is None:
                return index, 0
            value = np.zeros(1, np.uint64)
            page_sums(page, page_size, value)
            if value[0] or sums[number]:
                # Unlike the compiled kernel this writes zeros where a page became zero.
                os.pwrite(fd, page, offset)
        except OSError as error:
            return index, error.errno or errno.EIO
        sums[number] = value[0]
    return len(rows), 0


def _page_of(fd: int, kind: int, offset: int, payload: Bytes, page_size: int) -> Bytes | None:
    if kind == ZERO:
        return bytes(page_size)
    if kind == PAGE:
        return payload
    if kind == COMPRESS:
        return None
    page = bytearray(os.pread(fd, page_size, offset))
    if len(page) < page_size:
        raise OSError(errno.EIO, "the file is shorter than its pages")
    return page if xbzrle_decode(payload, page) else None
