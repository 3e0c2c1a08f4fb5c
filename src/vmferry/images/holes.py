"""Holes in files, and what O_DIRECT asks for: the system calls that Python has no name for."""

from __future__ import annotations

import ctypes
import errno
import os
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16
"""``linux/falloc.h``."""

_libc: Final = ctypes.CDLL(None, use_errno=True)
_fallocate: Final = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch(fd: int, offset: int, length: int) -> None:
    """Make it zeroes that take no storage.  Raises OSError, also where that cannot be."""
    _allocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero(fd: int, offset: int, length: int) -> None:
    """Make it zeroes without giving storage back.  Raises OSError, also where that cannot be."""
    _allocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def next_data(fd: int, offset: int) -> int:
    """Where from *offset* on there is no hole; far out if nowhere."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return 1 << 63
        if error.errno == errno.EINVAL:  # a block device: all is data
            return offset
        raise


def next_hole(fd: int, offset: int) -> int:
    """Where from *offset* on, which is data, there is a hole; far out if nowhere."""
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return 1 << 63
        raise


def direct_alignment(fd: int) -> int:
    """Bytes that offsets, lengths and addresses have to be multiples of; *fd* is ``O_DIRECT``.

    Found by trying, as QEMU does: the kernel tells it only since Linux 6.1, and not of all.
    """
    page = memoryview(mmap(-1, 8192, MAP_PRIVATE | MAP_ANONYMOUS))
    for size in (512, 1024, 2048):
        try:
            os.preadv(fd, [page[size : 2 * size]], 0)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return size
    return 4096


def _allocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))
