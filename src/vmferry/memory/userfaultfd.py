"""The dirty log of ``userfaultfd(2)``: write-protected pages, which the kernel itself opens again.

With ``UFFD_FEATURE_WP_ASYNC`` (Linux 6.7) a write to a protected page costs one short fault and
wakes nobody.  :mod:`.pagemap` lists the pages that lost their protection and protects them again
in the same step, so that no write falls between.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import VmferryError

from .bits import check_bitmap, runs, set_bits
from .blocks import PAGE_SIZE, GuestMemory, MemoryBlock
from .pagemap import Pagemap, resident

Flags = npt.NDArray[np.bool_]

# linux/userfaultfd.h
_UFFD_API: Final = 0xAA
_UFFD_USER_MODE_ONLY: Final = 1
_FEATURES: Final = (1 << 12) | (1 << 13) | (1 << 15)
"""``WP_HUGETLBFS_SHMEM``, ``WP_UNPOPULATED``, ``WP_ASYNC``."""
_MODE_WP: Final = 2
_PROTECT: Final = 1
_API: Final = 0xC018AA3F
_REGISTER: Final = 0xC020AA00
_WRITEPROTECT: Final = 0xC018AA06
_SYSTEM_CALL: Final = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "ppc64le": 364, "s390x": 355}

_REGION: Final = 2 << 20
"""What one page of page tables covers."""

_WINDOW: Final = 1 << 30
"""Bytes looked at in one go: what the arrays for it have to hold."""


class UserfaultfdLog:
    """Sees all writes through the mapping: by threads, by the kernel, by virtual CPUs of KVM.

    Memory that was never touched is not looked at: a *region* of 2 MiB is, from when it has memory
    on.  Then all its pages are protected, those that have no memory yet by marks in the page table.
    """

    name: Final = "userfaultfd"

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._descriptor = -1
        self._pagemap: Pagemap | None = None
        self._regions: dict[MemoryBlock, Flags] = {}

    def start(self) -> None:
        """See :meth:`DirtyLog.start`."""
        try:
            self._pagemap = Pagemap()
            self._descriptor = _open()
            self._memory.watch(self._add)
        except BaseException as error:
            self.stop()
            if isinstance(error, OSError):
                raise VmferryError(f"no dirty log by userfaultfd: {error}") from error
            raise

    def stop(self) -> None:
        """See :meth:`DirtyLog.stop`.  All protection ends with the descriptor."""
        self._memory.unwatch(self._add)
        if self._pagemap is not None:
            self._pagemap.close()
            self._pagemap = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._regions.clear()

    def collect(self, block: MemoryBlock, into: npt.NDArray[np.uint64]) -> int:
        """See :meth:`DirtyLog.collect`."""
        check_bitmap(block, into)
        if self._pagemap is None or block not in self._regions:
            return 0
        new = self._find_new(block)
        count = 0
        for start, end in _spans(self._regions[block], block.size):
            written = self._pagemap.take_written(block.address + start, block.address + end)
            if written is None:
                continue
            first, last = start // _REGION, -(-end // _REGION)
            for low, high in _spans(new[first:last], end - start):
                pages = slice(low // PAGE_SIZE, high // PAGE_SIZE)
                written[pages] &= _populated(block, start + low, written[pages])
            count += set_bits(into, start // PAGE_SIZE, written)
        return count

    def _add(self, block: MemoryBlock) -> None:
        if not block.logged:
            return
        self._ioctl(_REGISTER, block.address, block.size, _MODE_WP, 0)
        self._regions[block] = np.zeros(-(-block.size // _REGION), np.bool_)
        self._find_new(block)
        for start, end in _spans(self._regions[block], block.size):
            self._ioctl(_WRITEPROTECT, block.address + start, end - start, _PROTECT)

    def _ioctl(self, request: int, *words: int) -> None:
        fcntl.ioctl(self._descriptor, request, bytearray(struct.pack(f"{len(words)}Q", *words)))

    def _find_new(self, block: MemoryBlock) -> Flags:
        """Take up the regions that have memory by now; which are new."""
        known = self._regions[block]
        new = np.zeros_like(known)
        for first, last in runs(~known):
            new[list(_having_memory(block, first, last, _REGION))] = True
        known |= new
        return new


def _populated(block: MemoryBlock, start: int, wanted: Flags) -> Flags:
    """Which of the *wanted* pages from byte *start* on have memory.

    A page of a region that was not protected before is taken for written where it is not mapped,
    for it may have been written and swapped out.  If so, the file has it.
    """
    known = resident(block.address + start, len(wanted))
    offset = start // PAGE_SIZE
    for first, last in runs(wanted & ~known):
        for page in _having_memory(block, offset + first, offset + last, PAGE_SIZE):
            known[page - offset] = True
    return known


def _having_memory(block: MemoryBlock, at: int, last: int, unit: int) -> Iterator[int]:
    """Which of the units *at* to *last*, of *unit* bytes each, have memory."""
    while at < last and (at := block.next_populated(at * unit) // unit) < last:
        yield at
        at += 1


def _open() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYSTEM_CALL.get(os.uname().machine, -1)
    descriptor = libc.syscall(number, _UFFD_USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    fcntl.ioctl(descriptor, _API, bytearray(struct.pack("3Q", _UFFD_API, _FEATURES, 0)))
    return int(descriptor)


def _spans(regions: Flags, size: int) -> Iterator[tuple[int, int]]:
    """The runs of regions that are set, in bytes, none longer than a window."""
    for first, last in runs(regions):
        for start in range(first * _REGION, last * _REGION, _WINDOW):
            yield start, min(start + _WINDOW, last * _REGION, size)
