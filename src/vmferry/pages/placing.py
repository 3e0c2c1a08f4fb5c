"""Putting records of pages where they belong, with those that came compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from vmferry.errors import StreamError

from .compression import inflate_page
from .rows import COMPRESS, KINDS, PAGE, XBZRLE, Rows, rows_of

Place: TypeAlias = Callable[[Rows, int, memoryview], int]
"""Places rows from an index on, whose payloads lie in the data, and returns the first that it
cannot do: a compressed page, or one that breaks a rule."""


def place_rows(place: Place, rows: Rows, data: memoryview, page_size: int) -> None:
    """Have *place* take all *rows*, the compressed ones inflated.

    Raises :class:`StreamError` with the position in *data* as its offset.
    """
    done = 0
    while (done := place(rows, done, data)) < len(rows):
        done = _inflate(place, rows, done, data, page_size)


def _inflate(place: Place, rows: Rows, first: int, data: memoryview, page_size: int) -> int:
    """Place the compressed pages at *first*; whatever else stands there is broken."""
    kinds = rows["word"][first:] & np.uint64(KINDS & (page_size - 1))
    others = np.flatnonzero(kinds != COMPRESS)
    stop = first + (int(others[0]) if len(others) else len(kinds))
    if stop == first:
        raise StreamError(
            "an XBZRLE page whose runs fit" if kinds[0] == XBZRLE else "a page in its block",
            "one that overruns",
            offset=int(rows["position"][first]),
        )
    pages = [_inflated(row, data, page_size) for row in rows[first:stop].tolist()]
    words = (rows["word"][first:stop] & ~np.uint64(page_size - 1)) | np.uint64(PAGE)
    positions = np.arange(len(pages), dtype=np.uint64) * np.uint64(page_size)
    inflated = rows_of(words, positions, page_size)
    place_rows(place, inflated, memoryview(b"".join(pages)), page_size)
    return stop


def _inflated(row: tuple[int, int, int, int], data: memoryview, page_size: int) -> bytes:
    _, position, length, _ = row
    try:
        return inflate_page(data[position : position + length], page_size)
    except StreamError as error:
        raise error.within(offset=position) from None
