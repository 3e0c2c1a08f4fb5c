"""Sets of pages as bitmaps: bit ``i % 64`` of word ``i // 64`` is page ``i``.

The words are numbers of this machine, on x86 as in KVM's dirty log.  Bits behind the last page of
a block are for its owner to leave clear.  Nothing here is atomic.
"""

from __future__ import annotations

import numpy as np

from .types import U8, U64


def count_pages(bitmap: U64) -> int:
    """How many pages are in the set."""
    return int(np.unpackbits(np.ascontiguousarray(bitmap).view(np.uint8)).sum(dtype=np.int64))


def set_range(bitmap: U64, first: int, count: int) -> None:
    """Add *count* pages from *first* on."""
    if first < 0 or count < 0 or count > 64 * len(bitmap) - first:
        raise ValueError("set_range: pages outside the bitmap")
    words = slice(first // 64, (first + count + 63) // 64)
    bits = _bits(bitmap[words])
    start = first % 64
    bits[start : start + count] = 1
    bitmap[words] = _words(bits)


def take_pages(bitmap: U64, first: int, limit: int, out: U64) -> tuple[int, int]:
    """Move up to *limit* pages, ascending from *first* on, from the set into *out*.

    Returns the page to go on from, which is behind the last one taken, or behind the bitmap where
    no page is left; and how many were taken.
    """
    if first < 0 or limit < 0 or limit > len(out):
        raise ValueError("take_pages: a page before the first, or more pages than out has room for")
    bits = _bits(bitmap)
    found = np.flatnonzero(bits[first:])[:limit] + first
    out[: len(found)] = found
    bits[found] = 0
    bitmap[:] = _words(bits)
    if len(found) == limit:
        return (int(found[-1]) + 1 if limit else first), limit
    return max(first, len(bits)), len(found)


def _bits(words: U64) -> U8:
    """A byte for each bit."""
    return np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")


def _words(bits: U8) -> U64:
    return np.packbits(bits, bitorder="little").view("<u8").astype(np.uint64)
