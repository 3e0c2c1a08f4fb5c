"""The dirty log of ``userfaultfd(2)``: write-protected pages, which the kernel itself opens again.

With ``UFFD_FEATURE_WP_ASYNC`` (Linux 6.7) a write to a protected page costs one short fault and
wakes nobody.  :mod:`.pagemap` lists the pages that lost their protection and protects them again
in the same step, so that no write falls between.

No privilege is needed: ``UFFD_USER_MODE_ONLY`` keeps faults of the kernel from being *delivered*
to this process, and here none is.  ``/dev/userfaultfd``, which only root may open, would add
nothing.  But ``/proc/self/pagemap`` has to be readable, which it is not in a process that changed
its user id until it executes a program (``PR_SET_DUMPABLE``).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import numpy as np

from vmferry.errors import UsageError, VmferryError, printable
from vmferry.pages import count_pages

from .bits import Bitmap, Flags, gathered, runs, set_bits
from .blocks import GuestMemory, MemoryBlock
from .faults import USER_MODE_ONLY, greeted, userfaultfd
from .holes import PAGE_SIZE, REGION, populated, units_populated
from .pagemap import Pagemap

# linux/userfaultfd.h
_FEATURES: Final = (1 << 12) | (1 << 13) | (1 << 15)
"""``WP_HUGETLBFS_SHMEM``, ``WP_UNPOPULATED``, ``WP_ASYNC``."""
_MODE_WP: Final = 2
_PROTECT: Final = 1
_REGISTER: Final = 0xC020AA00
_WRITEPROTECT: Final = 0xC018AA06

_WINDOW: Final = 1 << 30
"""Bytes looked at in one go: what the arrays for it have to hold."""


class UserfaultfdLog:
    """Sees all writes of this process: by its threads, by the kernel, by virtual CPUs of KVM.

    What a virtual CPU writes goes through the page tables of the process, and when they change
    KVM's own follow (the kernel's MMU notifiers).  With *host_only* the mapping for virtual CPUs
    is left out.

    Memory that was never touched is not looked at: a region (2 MiB) is, from when it has memory
    on.  Then all its pages are protected, holes too.  A page that was a hole and is read before
    its region is protected counts as written.
    """

    name: Final = "userfaultfd"

    def __init__(self, memory: GuestMemory, *, host_only: bool = False) -> None:
        self._memory = memory
        self._host_only = host_only
        self._mappings: dict[MemoryBlock, dict[int, Flags]] = {}
        self._cleanup = ExitStack()

    @classmethod
    def missing(cls) -> str | None:
        """What this host or this process lacks for such a log; ``None`` if it can be had."""
        try:
            Pagemap().close()
        except PermissionError:
            return (
                "/proc/self/pagemap may not be opened: this process changed its user id and has "
                "executed no program since"
            )
        except OSError as error:
            return f"/proc/self/pagemap: {error.strerror}"
        try:
            os.close(_open())
        except OSError as error:
            return (
                f"userfaultfd with UFFD_FEATURE_WP_ASYNC: {error.strerror}; Linux 6.7 has it, "
                "and a filter for system calls may forbid it"
            )
        return None

    def start(self) -> None:
        """See :meth:`DirtyLog.start`."""
        self.stop()
        with ExitStack() as cleanup:
            try:
                self._pagemap = Pagemap()
                cleanup.callback(self._pagemap.close)
                # All protection ends with the descriptor.
                self._descriptor = _open()
                cleanup.callback(os.close, self._descriptor)
                cleanup.callback(self._forget)
                self._memory.watch(self._add)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise UsageError("the memory has a dirty log by userfaultfd already") from error
                raise VmferryError(f"no dirty log by userfaultfd: {error.strerror}") from error
            cleanup.callback(self._memory.unwatch, self._add)
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """See :meth:`DirtyLog.stop`."""
        self._cleanup.close()

    def content(self, block: MemoryBlock) -> memoryview:
        """See :meth:`DirtyLog.content`."""
        return block.image

    def collect(self, block: MemoryBlock, into: Bitmap) -> int:
        """See :meth:`DirtyLog.collect`."""
        with gathered(block, into) as found:
            for address in self._mapped(block):
                self._collect(block, address, found)
        return count_pages(found)

    def _mapped(self, block: MemoryBlock) -> dict[int, Flags]:
        try:
            return self._mappings[block]
        except KeyError:
            raise UsageError(
                f"block {printable(block.name)} is in no dirty log that was started"
            ) from None

    def _collect(self, block: MemoryBlock, address: int, found: Bitmap) -> None:
        regions = self._mappings[block][address]
        new = _take_new(block, regions)
        for start, end in _spans(regions, block.size):
            written = self._pagemap.take_written(address + start, address + end)
            if written is None:
                continue
            first = start // PAGE_SIZE
            for low, high in _page_runs(new[start // REGION : -(-end // REGION)], len(written)):
                # These had no marks before, so a hole looks as if it had been written.
                at = address + start + low * PAGE_SIZE
                written[low:high] &= populated(block.fd, at, first + low, first + high)
            set_bits(found, first, written)

    def _add(self, block: MemoryBlock, address: int) -> None:
        if self._host_only and address != block.address:
            return
        # A huge page would be one page here.
        block.use_huge_pages(address, on=False)
        self._ioctl(_REGISTER, address, block.size, _MODE_WP, 0)
        regions = np.zeros(-(-block.size // REGION), np.bool_)
        _take_new(block, regions)
        for start, end in _spans(regions, block.size):
            self._ioctl(_WRITEPROTECT, address + start, end - start, _PROTECT)
        self._mappings.setdefault(block, {})[address] = regions

    def _forget(self) -> None:
        for block, addresses in self._mappings.items():
            for address in addresses:
                block.use_huge_pages(address, on=True)
        self._mappings.clear()

    def _ioctl(self, request: int, *words: int) -> None:
        fcntl.ioctl(self._descriptor, request, bytearray(struct.pack(f"{len(words)}Q", *words)))


def _open() -> int:
    return greeted(userfaultfd(USER_MODE_ONLY), _FEATURES)


def _take_new(block: MemoryBlock, regions: Flags) -> Flags:
    """Set the *regions* that have memory by now; which are new."""
    new = np.zeros_like(regions)
    for first, last in runs(~regions):
        new[list(units_populated(block.fd, first, last, REGION))] = True
    regions |= new
    return new


def _spans(regions: Flags, size: int) -> Iterator[tuple[int, int]]:
    """The runs of regions that are set, in bytes, none longer than a window."""
    for first, last in runs(regions):
        for start in range(first * REGION, last * REGION, _WINDOW):
            yield start, min(start + _WINDOW, last * REGION, size)


def _page_runs(regions: Flags, pages: int) -> Iterator[tuple[int, int]]:
    """The runs of regions that are set, in pages, of which there are *pages*."""
    for first, last in runs(regions):
        yield first * REGION // PAGE_SIZE, min(last * REGION // PAGE_SIZE, pages)
