"""Which pages of a memfd have memory.  The others are holes: never touched, and zero.

They stay holes only while nobody looks: reading a page through a mapping gives it memory.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final

import numpy as np

from .bits import Flags, runs

PAGE_SIZE: Final = 4096
"""Bytes of a page, in blocks and in dirty logs."""

REGION: Final = 2 << 20
"""Bytes of a *region*: what one page of page tables covers, and what a huge page has."""

_PAGES: Final = REGION // PAGE_SIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def next_populated(fd: int, at: int) -> int | None:
    """The first byte from *at* on that has memory, or ``None``."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise


def units_populated(fd: int, at: int, last: int, size: int) -> Iterator[int]:
    """Which of the units from *at* to before *last*, of *size* bytes each, have any memory."""
    while at < last and (byte := next_populated(fd, at * size)) is not None:
        if (at := byte // size) < last:
            yield at
        at += 1


def populated(fd: int, address: int, first: int, last: int) -> Flags:
    """Which of the pages *first* to before *last* have memory; *address* is where the first is."""
    found = np.zeros(last - first, np.bool_)
    regions = np.zeros(-(-last // _PAGES), np.bool_)
    regions[list(units_populated(fd, first // _PAGES, len(regions), REGION))] = True
    for region, behind in runs(regions):
        start, end = max(region * _PAGES, first), min(behind * _PAGES, last)
        part = found[start - first : end - first]
        part |= _resident(address + (start - first) * PAGE_SIZE, end - start)
        if part.all():
            continue
        # What is not resident may have been swapped out.
        for low, high in runs(~part):
            for page in units_populated(fd, start + low, start + high, PAGE_SIZE):
                part[page - start] = True
    return found


def _resident(address: int, pages: int) -> Flags:
    """Which *pages* have memory in the page cache, mapped here or not (``mincore(2)``)."""
    found = np.zeros(pages, np.uint8)
    if _libc.mincore(address, pages * PAGE_SIZE, found.ctypes.data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (found & 1).view(np.bool_)
