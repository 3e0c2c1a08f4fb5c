"""Raw images: a file or a block device whose bytes are those of the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Final, NoReturn

from vmferry.errors import StorageError

from . import holes
from .aligned import AlignedAccess
from .image import Extent
from .locks import Permission, briefly, lock, release
from .storage import Access, Views
from .views import cut

_IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
_NO_ROOM_FOR_HOLES: Final = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})
_ZEROES: Final = memoryview(mmap(-1, 1 << 20, MAP_PRIVATE | MAP_ANONYMOUS)).toreadonly()
_BLKDISCARD: Final = 0x1277
"""``linux/fs.h``."""


class Place:
    """Where a file was opened, and which one it was."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: tuple[int, int] | None = None

    def note(self) -> None:
        """What is there now is what is open."""
        self._found = self._look()

    def check(self) -> None:
        """Raise where another file is there now, or none."""
        if self._look() != self._found:
            raise StorageError(
                f"{self._path}: the file was removed or replaced while it was open: what is open"
                " here cannot be opened again; have it back under its name before it is let go of"
            )

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino


class RawStorage:
    """The file or block device at *path*.

    *share_write* lets other processes write it at the same time, as QEMU's ``share-rw`` does.
    *direct* passes the page cache by (``O_DIRECT``).
    """

    def __init__(self, path: Path, *, read_only: bool, share_write: bool, direct: bool) -> None:
        self.path: Final = path
        self.read_only: Final = read_only
        self.uncached: Final = direct
        self._refuses: Final = [] if share_write else [Permission.WRITE]
        uses = [Permission.READ] if read_only else [Permission.READ, Permission.WRITE]
        self._uses: Final = uses
        self._place: Final = Place(path)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> Access:
        """See :meth:`Storage.open`."""
        fd = self._open(read_only=self.read_only)
        try:
            lock(fd, self.name, uses=self._uses, refuses=self._refuses)
            drop_cache(fd)
            self._place.note()
            return self._access(fd)
        except BaseException:
            os.close(fd)
            raise

    def check_place(self) -> None:
        """See :meth:`Storage.check_place`."""
        self._place.check()

    def look(self) -> Access:
        """See :meth:`Storage.look`.  Opened as the owner would, so that it will not fail then."""
        fd = self._open(read_only=self.read_only)
        os.close(fd)
        fd = self._open(read_only=True)
        try:
            return self._access(fd)
        except BaseException:
            os.close(fd)
            raise

    def _open(self, *, read_only: bool) -> int:
        # Without blocking, as the open of a named pipe waits for its other end.
        flags = os.O_CLOEXEC | os.O_NONBLOCK | (os.O_DIRECT if self.uncached else 0)
        try:
            fd = os.open(self.path, flags | (os.O_RDONLY if read_only else os.O_RDWR))
        except OSError as error:
            if error.errno == errno.EINVAL and self.uncached:
                raise StorageError(
                    f"{self.path}: cannot be opened past the cache: its file system has no O_DIRECT"
                ) from error
            raise
        mode = os.fstat(fd).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return fd
        os.close(fd)
        raise StorageError(f"{self.path}: expected a file or a block device, found neither")

    def _access(self, fd: int) -> Access:
        access = RawAccess(fd, self.name)
        if not self.uncached:
            return access
        return AlignedAccess(access, self.name, holes.direct_alignment(fd), memory=True)


class RawAccess:
    """Reads and writes through the descriptor *fd*, which it owns."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name
        self._is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.size = os.lseek(fd, 0, os.SEEK_END)

    def read(self, offset: int, into: Views) -> None:
        """See :meth:`Access.read`."""
        while into:
            count = os.preadv(self._fd, into[:_IOV_MAX], offset)
            if not count:
                self._refuse_cut(offset)
            into = cut(into, count)[1]
            offset += count

    def write(self, offset: int, data: Views, *, durable: bool = False) -> None:
        """See :meth:`Access.write`."""
        flags = os.RWF_DSYNC if durable else 0
        while data:
            count = os.pwritev(self._fd, data[:_IOV_MAX], offset, flags)
            data = cut(data, count)[1]
            offset += count

    def flush(self) -> None:
        """See :meth:`Access.flush`."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`Access.discard`."""
        try:
            if self._is_device:
                fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("QQ", offset, length))
            else:
                holes.punch(self._fd, offset, length)
        except OSError as error:
            if error.errno not in _NO_ROOM_FOR_HOLES:
                raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See :meth:`Access.write_zeroes`."""
        try:
            (holes.punch if unmap else holes.zero)(self._fd, offset, length)
        except OSError as error:
            if error.errno not in _NO_ROOM_FOR_HOLES:
                raise
            for at in range(offset, offset + length, len(_ZEROES)):
                self.write(at, [_ZEROES[: offset + length - at]])

    def resize(self, size: int) -> None:
        """See :meth:`Access.resize`."""
        if self._is_device:
            raise StorageError(f"{self._name}: cannot be resized: it is a device")
        with briefly(self._fd, self._name, Permission.RESIZE):
            os.ftruncate(self._fd, size)
        self.size = size

    def extents(self, offset: int, length: int, *, own: bool = False) -> list[Extent]:
        """See :meth:`Access.extents`."""
        if own:  # there is nothing behind it
            return [Extent(offset, length)]
        end = offset + length
        start = min(holes.next_data(self._fd, offset), end)
        if start == end and not self._is_device and (now := os.fstat(self._fd).st_size) < end:
            self._refuse_cut(now)  # that is no hole
        extents = [Extent(offset, start - offset, data=False)] if start > offset else []
        if start < end:
            stop = min(holes.next_hole(self._fd, start), end)
            extents.append(Extent(start, stop - start))
        return extents

    def _refuse_cut(self, offset: int) -> NoReturn:
        raise StorageError(
            f"{self._name}: expected {self.size} bytes, found its end at byte {offset}: it was cut"
            " while it was open"
        )

    def close(self) -> None:
        """See :meth:`Access.close`."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                release(fd)
            finally:
                os.close(fd)


def drop_cache(fd: int) -> None:
    """Let this host forget what it has cached of a file that another host may have written.

    A file system on a device of this host is left alone: its cache is right, and dropping 1 GiB
    of it would take a tenth of a second while a machine waits.  Those of a network have no device.
    """
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode) or not os.major(status.st_dev):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
