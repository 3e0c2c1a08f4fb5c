"""Dirty logs: which pages were written since one asked last."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError

from .blocks import GuestMemory, MemoryBlock
from .userfaultfd import UserfaultfdLog


class DirtyLog(Protocol):
    """Which pages of a :class:`GuestMemory` were written.

    All blocks are logged but those that are ``shared`` or ``read_only``, which have no dirty pages.
    """

    @property
    def name(self) -> str:
        """``userfaultfd``, ``kvm`` or ``shadow``."""

    def start(self) -> None:
        """Log writes from now on, also to blocks that are added later."""

    def collect(self, block: MemoryBlock, into: npt.NDArray[np.uint64]) -> int:
        """Set the bits of the pages that were written since the last call, or since the start.

        Bit ``i % 64`` of word ``i // 64`` is page *i*; words are little-endian, and bits that are
        set stay so.  Returns how many pages were found written.  Each write is reported by this
        call or by the next, whenever it happens.  One thread at a time.
        """

    def stop(self) -> None:
        """Log no more and release what that took.  Idempotent."""


def open_dirty_log(memory: GuestMemory, kind: str = "auto") -> DirtyLog:
    """The log of this *kind*, or the quickest that this host and this process have."""
    if kind not in {"auto", UserfaultfdLog.name}:
        raise UsageError(f"expected a dirty log auto or userfaultfd, found {kind}")
    return UserfaultfdLog(memory)
