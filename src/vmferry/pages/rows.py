"""A batch of pages as a table: one row per page record, read by the kernels.

A row keeps the record's own header word, so a batch can be written again byte for byte: the page's
offset in its RAM block is ``word & -page_size``, the flags are the bits below.  ``position`` and
``length`` say where the record's payload lies in the batch's data.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

ROW: Final = np.dtype(
    [("word", "u8"), ("position", "u8"), ("length", "u4"), ("unused", "u4")], align=True
)
"""``word`` and ``position`` in native byte order, 24 bytes a row."""

Rows = npt.NDArray[np.void]

# Flags of a RAM record, QEMU 7.2 migration/ram.c (RAM_SAVE_FLAG_*).
ZERO: Final = 0x002
PAGE: Final = 0x008
CONTINUE: Final = 0x020
XBZRLE: Final = 0x040
COMPRESS: Final = 0x100
KINDS: Final = ZERO | PAGE | XBZRLE | COMPRESS

MAX_PAGE_SIZE: Final = 65536
"""The largest target page of any machine is 16 KiB; the kernels keep one page on the stack."""


def compress_bound(page_size: int) -> int:
    """The most bytes that zlib makes of one page (zlib's ``compressBound``)."""
    return page_size + (page_size >> 12) + (page_size >> 14) + 13


def rows_of(words: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64], length: int) -> Rows:
    """Rows for records with payloads of one *length*, at *positions* of the data."""
    rows = np.zeros(len(words), ROW)
    rows["word"] = words
    rows["position"] = positions
    rows["length"] = length
    return rows
