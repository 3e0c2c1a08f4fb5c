"""Dirty logs: which pages were written since one asked last."""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError

from .blocks import GuestMemory, MemoryBlock
from .kvm import KvmLog, KvmSlots
from .shadow import ShadowLog
from .userfaultfd import UserfaultfdLog


class DirtyLog(Protocol):
    """Which pages of a :class:`GuestMemory` were written; all its blocks are logged.

    Whoever sends pages starts the log, sends :meth:`content` once, and then again and again what
    :meth:`collect` reports, the last time when nothing writes any more.  One thread at a time.
    """

    @property
    def name(self) -> str:
        """``userfaultfd``, ``kvm`` or ``shadow``."""

    def start(self) -> None:
        """Log writes from now on, also to blocks that are added later.

        Raises :class:`~vmferry.errors.VmferryError` where the kernel refuses.
        """

    def content(self, block: MemoryBlock) -> memoryview:
        """The bytes to send for the pages of the block.

        Mostly those of the block itself, but a log that compares has to know what was sent: with
        it they are a copy, as of the last :meth:`collect`.
        """

    def collect(self, block: MemoryBlock, into: npt.NDArray[np.uint64]) -> int:
        """Set the bits of the pages that were written since the last call, or since the start.

        Bit ``i % 64`` of word ``i // 64`` is page *i*; words are little-endian, and bits that are
        set stay so.  Returns how many pages were found.  Each write is found by this call or by
        the next, whenever it happens.
        """

    def stop(self) -> None:
        """Log no more and release what that took.  Idempotent."""


KINDS: Final = ("auto", "userfaultfd", "kvm", "shadow")


def open_dirty_log(
    memory: GuestMemory, kind: str = "auto", *, kvm: KvmSlots[Any] | None = None
) -> DirtyLog:
    """The log of this *kind*, to be started.

    ``auto`` is ``kvm`` if virtual CPUs of *kvm* write the memory, and else ``userfaultfd``; where
    that is not to be had, ``shadow``.  Raises :class:`~vmferry.errors.UsageError` with the reason
    where a kind that was asked for by name is not to be had.
    """
    if kind not in KINDS:
        raise UsageError(f"expected a dirty log {', '.join(KINDS)}, found {kind!r}")
    missing = UserfaultfdLog.missing()
    if kind == "auto":
        usable = "userfaultfd" if kvm is None else "kvm"
        kind = "shadow" if missing else usable
    if kind == "shadow":
        return ShadowLog(memory)
    if missing:
        raise UsageError(f"the dirty log {kind} is not to be had here: {missing}")
    if kind == "userfaultfd":
        return UserfaultfdLog(memory)
    if kvm is None:
        raise UsageError("the dirty log kvm is for a machine on KVM, and this one is not")
    return KvmLog(memory, kvm)
