"""The locks by which QEMU keeps others off an image file, taken as QEMU takes them.

They are shared open-file-description locks (``fcntl(2)``, ``F_OFD_SETLK``) of one byte each; the
bytes are coordinates only, nothing of the file is touched.  Byte 100 + p: the holder uses
permission p; byte 200 + p: the holder lets no other use it (QEMU 7.2 ``block/file-posix.c``,
``RAW_LOCK_PERM_BASE``).  Whoever comes takes his own first and then tests those of others, so of
two that come together none or one gets in, but never both.  They end with the description that the
descriptor stands for, whoever has a copy of it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Final

from vmferry.errors import ImageLocked

_USED: Final = 100
_REFUSED: Final = 200
_FLOCK: Final = struct.Struct("hhqqi4x")
"""``struct flock``: type, whence, start, length, process."""

_NONE_HERE: Final = frozenset(
    {errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY}
)
"""What a file system answers that has no such locks."""

_log: Final = logging.getLogger(__name__)
_told: Final = set[int]()


class Permission(IntEnum):
    """What can be done with an image; QEMU's names in its messages are these."""

    READ = 0
    WRITE = 1
    RESIZE = 3

    def __str__(self) -> str:
        return "consistent read" if self is Permission.READ else self.name.lower()


def lock(fd: int, name: str, *, uses: Iterable[Permission], refuses: Iterable[Permission]) -> None:
    """Lock the file for those permissions.

    Raises :class:`ImageLocked`; what was taken is then still held, until
    :func:`release`.  Where the file system has no such locks, a warning says so, once, and there is
    none.
    """
    uses, refuses = list(uses), list(refuses)
    try:
        for byte in (*(_USED + p for p in uses), *(_REFUSED + p for p in refuses)):
            _set(fd, fcntl.F_RDLCK, byte)
        for permission in uses:
            if _held_by_others(fd, _REFUSED + permission):
                raise _conflict(name, f'"{permission}"', "does not share it")
        for permission in refuses:
            if _held_by_others(fd, _USED + permission):
                raise _conflict(name, f'shared "{permission}"', "uses it that way")
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise
        _tell(fd, name, error)


def release(fd: int) -> None:
    """Give all locks back, also those that a copy of *fd* in a child process would keep."""
    _unlock(fd, _USED, _REFUSED + 100 - _USED)


@contextmanager
def briefly(fd: int, name: str, permission: Permission) -> Iterator[None]:
    """Hold one more permission inside the block."""
    try:
        lock(fd, name, uses=[permission], refuses=[])
        yield
    finally:
        _unlock(fd, _USED + permission, 1)


def _set(fd: int, kind: int, byte: int, count: int = 1) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, count, 0))


def _unlock(fd: int, byte: int, count: int) -> None:
    try:
        _set(fd, fcntl.F_UNLCK, byte, count)
    except OSError as error:
        if error.errno not in _NONE_HERE:
            raise


def _held_by_others(fd: int, byte: int) -> bool:
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    return kind != fcntl.F_UNLCK


def _conflict(name: str, which: str, why: str) -> ImageLocked:
    return ImageLocked(
        f"{name}: failed to get the {which} lock: another process has the image and {why}; "
        "end it, or hand the image over"
    )


def _tell(fd: int, name: str, error: OSError) -> None:
    """Once for each file system."""
    device = os.fstat(fd).st_dev
    if device not in _told:
        _told.add(device)
        _log.warning(
            "%s: its file system has no open-file-description locks (%s): "
            "nothing keeps another process off its images",
            name,
            error.strerror,
        )
