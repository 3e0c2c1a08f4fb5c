"""The record as a file on the storage that has the images.

Right for file systems on which a rename is atomic for every reader, ``fsync`` reaches the storage,
and open-file-description locks reach every host that uses it: ext4, XFS and Btrfs on one host, NFS
4 with locks (not mounted with ``nolock`` or ``local_lock``), GFS2, OCFS2, CephFS.  Not for storage
whose hosts each lock by themselves: NFS with ``local_lock``, 9p, most FUSE file systems.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from vmferry.errors import StorageError, UsageError, storage_error

from .names import is_dead
from .protocol import Swap
from .record import MAX_SIZE, decode
from .store import Outcome, Seen, StoreSilent

_PATIENCE: Final = 5.0
"""Seconds that another may hold the lock; who has it does three small writes."""

_LOOK: Final = 0.005
_FLOCK: Final = struct.Struct("hhqqi4x")
"""``struct flock``: type, whence, start, length, process."""


class _Taken(StoreSilent):
    """Another process has a lock."""


class FileStore:
    """The record in the file *path*, locked by ``path.lock``, which stays.

    A file cannot tell a dead engine from a slow one.  One of this very host whose process is dead
    counts as gone; of all others only an operator can say so.
    """

    term = None

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self.uri = f"file:{path}"

    def read(self) -> Seen:
        """See :class:`~.store.Store`."""
        try:
            with self._path.open("rb") as file:
                text = file.read(MAX_SIZE + 1)
        except FileNotFoundError:
            if not self._path.parent.is_dir():
                raise storage_error(self._path.parent, "found", 2) from None
            return Seen(None, b"")
        except OSError as error:
            raise StoreSilent(str(storage_error(self._path, "read", error))) from error
        return Seen(decode(text, str(self._path)), text)

    def swap(self, seen: Seen, swap: Swap) -> Outcome:
        """See :class:`~.store.Store`."""
        try:
            with self._locked():
                if self.read().mark != seen.mark:
                    return Outcome.LOST
                if swap.gone and not self.gone(swap.gone):
                    return Outcome.NOT_GONE
                self._write(swap.record.encode())
        except StoreSilent:
            return Outcome.UNKNOWN
        except OSError:
            return Outcome.UNKNOWN
        return Outcome.LANDED

    def gone(self, name: str) -> bool:
        """See :class:`~.store.Store`."""
        return is_dead(name)

    def keep(self, name: str, seen: Seen | None) -> bool:  # noqa: ARG002
        """See :class:`~.store.Store`: there is no term, and so only the record counts."""
        return seen is None or self.read().mark == seen.mark

    def leave(self, name: str) -> None:
        """Nothing."""

    @contextmanager
    def lead(self) -> Iterator[None]:
        """Be the only one who leads engines that do not look at the record themselves.

        Nobody else does so as long as this process lives, be it frozen.  Raises
        :class:`~vmferry.errors.UsageError` where somebody does.
        """
        lock = os.open(f"{self._path}.leader", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            self._take(lock, 0)
            yield
        except _Taken:
            raise UsageError(
                f"{self.uri}: another process leads a move of this machine: let it end, or end it"
            ) from None
        finally:
            os.close(lock)

    def _write(self, text: bytes) -> None:
        """The record is the old or the new one, whole, whenever the power fails."""
        new = self._path.with_name(self._path.name + ".new")
        try:
            with new.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self._path)
        except OSError:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            self._take(lock, _PATIENCE)
            yield
        finally:
            os.close(lock)  # which lets go of the lock

    def _take(self, lock: int, patience: float) -> None:
        deadline = time.monotonic() + patience
        wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        while True:
            try:
                fcntl.fcntl(lock, fcntl.F_OFD_SETLK, wanted)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _Taken(f"{self._path}: another holds its lock") from None
                time.sleep(_LOOK)
            except OSError as error:
                raise StorageError(
                    f"{self._path}: no record of who owns a machine can be kept on a file system"
                    f" without open-file-description locks ({error.strerror}): use etcd://"
                ) from error
            else:
                return
