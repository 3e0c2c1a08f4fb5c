"""What the kernel knows of the pages of a mapping: ``PAGEMAP_SCAN`` (Linux 6.7), ``mincore(2)``."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from .blocks import PAGE_SIZE

# linux/fs.h
_PAGEMAP_SCAN: Final = 0xC0606610
_SCAN_ARGUMENT: Final = struct.Struct("12Q")
_WALK_END: Final = 4
_WP_MATCHING: Final = 1 << 0
_CHECK_WPASYNC: Final = 1 << 1
_WRITTEN: Final = 1 << 1

_RUNS: Final = 1 << 15
"""How many runs of pages one scan may report."""


class Pagemap:
    """``/proc/self/pagemap``.

    No privilege is needed to open it, but a process that has changed its user id may not, until it
    executes a program (``PR_SET_DUMPABLE``).
    """

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._runs = np.zeros((_RUNS, 3), np.int64)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def take_written(self, start: int, end: int) -> npt.NDArray[np.bool_] | None:
        """Which pages between two addresses lost their protection; protects them again.

        A page that is not mapped counts as written unless the page table has a mark for it: where
        its protection would be is nothing.  ``None`` if there is none.
        """
        steps = np.zeros((end - start) // PAGE_SIZE + 1, np.int16)
        total, at = 0, start
        while at < end:
            found, at = self._scan(at, end)
            first, last = ((found[:, :2] - start) // PAGE_SIZE).T
            steps[first] += 1
            steps[last] -= 1  # where the walk begins anew, a page may be found a second time
            total += len(found)
        return np.cumsum(steps, dtype=np.int16)[:-1] != 0 if total else None

    def _scan(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], int]:
        """Runs of pages as (first address, address after it, what matched), and where it ended."""
        argument = bytearray(
            _SCAN_ARGUMENT.pack(
                _SCAN_ARGUMENT.size,
                _WP_MATCHING | _CHECK_WPASYNC,
                start,
                end,
                0,
                self._runs.ctypes.data,
                _RUNS,
                0,  # no limit on pages
                0,  # no category is inverted
                _WRITTEN,  # all of these are required
                0,  # none of several
                _WRITTEN,  # what is returned
            )
        )
        # fcntl.ioctl gives the interpreter lock away for a buffer that the call may change.
        found = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument)
        return self._runs[:found], _SCAN_ARGUMENT.unpack(argument)[_WALK_END]


def resident(address: int, pages: int) -> npt.NDArray[np.bool_]:
    """Which *pages* from *address* on have memory that is not swapped out, mapped or not."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = np.zeros(pages, np.uint8)
    if libc.mincore(
        ctypes.c_void_p(address),
        ctypes.c_size_t(pages * PAGE_SIZE),
        ctypes.c_void_p(found.ctypes.data),
    ):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return (found & 1).view(np.bool_)
