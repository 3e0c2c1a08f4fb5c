"""Pages that follow each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Runs: TypeAlias = Sequence[tuple[int, int]]
"""The number of the first page of each run, and of the one behind its last."""


def page_runs(pages: npt.NDArray[np.uint64]) -> list[tuple[int, int]]:
    """The runs of *pages*, which are numbers in any order."""
    if not len(pages):
        return []
    follows = pages[1:] - pages[:-1] == 1
    if follows.all():
        return [(first := int(pages[0]), first + len(pages))]
    breaks = np.flatnonzero(~follows)
    starts = pages[np.concatenate([[0], breaks + 1])].tolist()
    ends = pages[np.concatenate([breaks, [len(pages) - 1]])].tolist()
    return [(start, end + 1) for start, end in zip(starts, ends, strict=True)]
