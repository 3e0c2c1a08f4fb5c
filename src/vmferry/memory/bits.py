"""Sets of pages: *flags*, one of numpy's booleans for each page, and bitmaps of 64-bit words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError, printable

if TYPE_CHECKING:
    from .blocks import MemoryBlock

Flags = npt.NDArray[np.bool_]
Bitmap = npt.NDArray[np.uint64]

_WORD: Final = 64


@contextmanager
def gathered(block: MemoryBlock, into: Bitmap) -> Iterator[Bitmap]:
    """An empty bitmap for the *block*, which is added to the bitmap *into* at the end."""
    words = -(-block.pages // _WORD)
    if into.dtype != np.dtype("<u8") or len(into) < words:
        raise UsageError(
            f"block {printable(block.name)}: expected a bitmap of {words} little-endian 64-bit "
            f"words, found {len(into)} of type {into.dtype}"
        )
    found = np.zeros(words, np.uint64)
    try:
        yield found
    finally:
        # Also where an error ended it: what was found is not found again.
        into[:words] |= found


def set_bits(bitmap: Bitmap, first: int, flags: Flags) -> None:
    """Set the bits from *first* on whose flags are set."""
    if before := first % 8:
        flags = np.concatenate([np.zeros(before, np.bool_), flags])
    packed = np.packbits(flags, bitorder="little")
    bitmap.view(np.uint8)[first // 8 :][: len(packed)] |= packed


def get_bits(bitmap: Bitmap, count: int) -> Flags:
    """The first *count* bits as flags."""
    return np.unpackbits(bitmap.view(np.uint8), count=count, bitorder="little").view(np.bool_)


def spans(flags: Flags) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where *flags* are set: the first of each run, and the one after its last."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False))
    return edges[::2], edges[1::2]


def runs(flags: Flags) -> list[tuple[int, int]]:
    """As :func:`spans`, run by run."""
    starts, ends = spans(flags)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))
