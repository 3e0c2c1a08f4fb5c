"""Copying memory between files, holes as holes.

The kernel does the work, a stretch of data at a time; a file system that can share extents between
files (btrfs, XFS) copies nothing at all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

PIECE: Final = 32 << 20
"""Bytes in one call: an interrupt and the progress wait for no more than this."""

_BUFFER: Final = 1 << 20
_CANNOT: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EBADF}
)
"""What copy_file_range fails with where the file systems, not the data, are the matter."""


def copy_sparse(
    source: int, offset: int, size: int, target: int, to: int, passed: Callable[[int], None]
) -> None:
    """Copy *size* bytes from *offset* of one descriptor to *to* of the other.

    Where there is a hole nothing is written, so the target must have one there.  *passed* is called
    with each number of bytes done, those in holes included.  Raises OSError, and EOFError where the
    source ends early.
    """
    if os.fstat(source).st_size < offset + size:
        raise EOFError
    at, end = offset, offset + size
    while at < end:
        start, stop = _next_data(source, at, end)
        passed(start - at)
        while start < stop:
            count = _copy(source, start, min(stop - start, PIECE), target, to + start - offset)
            passed(count)
            start += count
        at = stop


def _next_data(source: int, at: int, end: int) -> tuple[int, int]:
    """Start and end of the first stretch of data from *at*; twice *end* where there is none."""
    try:
        start = os.lseek(source, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return end, end
    if start >= end:
        return end, end
    return start, min(os.lseek(source, start, os.SEEK_HOLE), end)


def _copy(source: int, offset: int, size: int, target: int, to: int) -> int:
    try:
        count = os.copy_file_range(source, target, size, offset, to)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        count = 0
    return count or _copy_through(source, offset, size, target, to)


def _copy_through(source: int, offset: int, size: int, target: int, to: int) -> int:
    """The same through memory of this process, for file systems between which nothing else goes."""
    data = os.pread(source, min(size, _BUFFER), offset)
    if not data:
        raise EOFError
    rest = memoryview(data)
    while rest:
        count = os.pwrite(target, rest, to)
        rest, to = rest[count:], to + count
    return len(data)
