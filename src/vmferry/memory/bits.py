"""Flags, one of numpy's booleans for a page, and bitmaps, one bit for a page."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError, printable

from .blocks import MemoryBlock

_WORD: Final = 64


def check_bitmap(block: MemoryBlock, bitmap: npt.NDArray[np.uint64]) -> None:
    """Refuse a bitmap that has no bit for some page of the *block*."""
    if bitmap.dtype != np.dtype("<u8") or len(bitmap) * _WORD < block.pages:
        raise UsageError(
            f"block {printable(block.name)}: expected a bitmap of {-(-block.pages // _WORD)} "
            f"little-endian 64-bit words, found {len(bitmap)} of type {bitmap.dtype}"
        )


def set_bits(bitmap: npt.NDArray[np.uint64], first: int, flags: npt.NDArray[np.bool_]) -> int:
    """Set the bit of every flag that is set, from bit *first* on, a multiple of 8; how many."""
    packed = np.packbits(flags, bitorder="little")
    bitmap.view(np.uint8)[first // 8 :][: len(packed)] |= packed
    return int(np.count_nonzero(flags))


def runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Where *flags* are set: the first of each run, and the one after its last."""
    edges = np.flatnonzero(np.diff(flags, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
