"""What the process of a machine and its pager know together, and what outlives the pager."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Final

import numpy as np

from .missing import Flags, Marks
from .waits import Times

_ALIGNED: Final = 8


class Shared:
    """Maps *descriptor*, a file that belongs to both, and gives it the size that it takes.

    ``marks`` has a byte for each of *pages*, ``asked`` a flag (see :mod:`.missing`), and ``times``
    the seconds of each of *threads*, and of all (see :mod:`.waits`).  It is mapped, and its
    descriptor kept, as long as one of them is.
    """

    def __init__(self, descriptor: int, pages: int, threads: Sequence[int]) -> None:
        times = -(-2 * pages // _ALIGNED) * _ALIGNED
        size = times + 8 * (len(threads) + 1)
        os.ftruncate(descriptor, size)
        mapped = mmap.mmap(descriptor, size)
        self.marks: Marks = np.frombuffer(mapped, np.uint8, pages)
        self.asked: Flags = np.frombuffer(mapped, np.bool_, pages, pages)
        self.times: Times = np.frombuffer(mapped, np.float64, -1, times)
