"""Filling an image with what stands elsewhere: what is nothing there takes no storage here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final

import numpy as np

from vmferry.pages import zero_pages

from .changes import CHUNK
from .image import Image

_PIECE: Final = 1 << 16
"""Zeroes in pieces of this many bytes take no storage: a cluster of qcow2, as QEMU makes them."""

_PIECES: Final = np.arange(CHUNK // _PIECE, dtype=np.uint64)


def has_data(image: Image, *, own: bool) -> Iterator[bool]:
    """For each chunk, whether any of it is allocated; nothing is looked up ahead."""
    extents = image.allocated(own=own)
    extent = next(extents, None)
    for start in range(0, image.size, CHUNK):
        while extent is not None and extent.end <= start:
            extent = next(extents, None)
        yield extent is not None and extent.offset < start + CHUNK


def fill(image: Image, offset: int, data: memoryview, length: int) -> None:
    """Write the first *length* bytes of a chunk; long runs of zeroes take no storage."""
    zero = np.empty(len(_PIECES), np.uint8)
    if not zero_pages(data, _PIECES, _PIECE, zero):
        image.write(offset, data[:length])
        return
    at = 0
    for is_zero, pieces in groupby(zero.tolist()):
        end = min(at + len(list(pieces)) * _PIECE, length)
        if is_zero:
            clear(image, offset + at, end - at)
        else:
            image.write(offset + at, data[at:end])
        if (at := end) == length:
            return


def clear(image: Image, offset: int, length: int) -> None:
    """Make it zeroes, where there may be anything else."""
    if any(True for _ in image.allocated(offset, length)):
        image.write_zeroes(offset, length)
