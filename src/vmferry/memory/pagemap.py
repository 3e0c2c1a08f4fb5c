"""What lost its write protection: the ioctl ``PAGEMAP_SCAN`` of ``/proc/PID/pagemap`` (Linux 6.7).

Documentation: ``admin-guide/mm/pagemap.rst`` of the kernel; numbers: ``linux/fs.h``.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

import numpy as np
import numpy.typing as npt

from .bits import Flags
from .holes import PAGE_SIZE

_PAGEMAP_SCAN: Final = 0xC0606610
_ARGUMENT: Final = struct.Struct("12Q")
_WALK_END: Final = 4
_WP_MATCHING: Final = 1 << 0
_CHECK_WPASYNC: Final = 1 << 1
_WRITTEN: Final = 1 << 1

_RUNS: Final = 1 << 15
"""How many runs of pages one call may report."""


class Pagemap:
    """``/proc/self/pagemap``, open until :meth:`close`."""

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._runs = np.zeros((_RUNS, 3), np.int64)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def take_written(self, start: int, end: int) -> Flags | None:
        """Which pages between two addresses are not protected; protects them again.  Or none.

        That of a page that is not mapped is a mark in the page table.  Where there is no mark
        either, the page counts as not protected: it may have been written and swapped out.
        """
        steps = np.zeros((end - start) // PAGE_SIZE + 1, np.int16)
        total, at = 0, start
        while at < end:
            found, at = self._scan(at, end)
            total += len(found)
            # One page may be found by two scans: the second begins where the buffer of the kernel
            # was full the last time, not behind all that the first has found.
            steps[(found[:, 0] - start) // PAGE_SIZE] += 1
            steps[(found[:, 1] - start) // PAGE_SIZE] -= 1
        return np.cumsum(steps, dtype=np.int16)[:-1] != 0 if total else None

    def _scan(self, start: int, end: int) -> tuple[npt.NDArray[np.int64], int]:
        """Runs of pages as (first address, address after it, what matched), and where it ended."""
        argument = bytearray(
            _ARGUMENT.pack(
                _ARGUMENT.size,
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
        # fcntl.ioctl releases the interpreter lock.
        found = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument)
        return self._runs[:found], _ARGUMENT.unpack(argument)[_WALK_END]
