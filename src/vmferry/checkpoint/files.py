"""Files inside a checkpoint directory: opened without being led out of it, written to last.

The names come from a manifest that a stranger may have written, and what bears them may be
anything: only plain files in plain directories below the checkpoint are opened, no symbolic links,
no pipes.  The directory itself may be a symbolic link: whoever names it means what it leads to.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import CheckpointDamaged, storage_error

_ZEROS: Final = bytes(1 << 16)

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without blocking, as the open of a named pipe waits for its other end.
_FILE: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of the directory: its size in bytes and its SHA-256 in hexadecimal."""

    file: str
    size: int
    sha256: str


def open_inside(directory: Path, name: str) -> int:
    """A descriptor of the plain file *name* (at most one folder deep) of *directory*.

    Raises :class:`OSError` as ``os.open`` does, :class:`CheckpointDamaged` for anything else that
    bears the name.
    """
    *folders, last = name.split("/")
    with ExitStack() as opened:
        at = os.open(directory, _FOLDER)
        opened.callback(os.close, at)
        try:
            for folder in folders:
                at = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
                opened.callback(os.close, at)
            descriptor = os.open(last, _FILE, dir_fd=at)
        except OSError as error:
            if error.errno in {errno.ELOOP, errno.ENOTDIR, errno.ENXIO}:
                raise _not_plain(directory / name) from None
            raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_plain(directory / name)
    return descriptor


def read_inside(directory: Path, name: str, most: int) -> bytes:
    """The content of a file, as :func:`open_inside` opens it; of a longer one *most* + 1 bytes."""
    descriptor = open_inside(directory, name)
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        pieces = []
        left = most + 1
        while left and (piece := file.read(min(left, 1 << 24))):
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)


def write_file(path: Path, data: bytes | bytearray | memoryview) -> FileEntry:
    """Write *data* to a new durable file; returns its entry, named relative to the checkpoint.

    Long runs of zeros become holes.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            for at in range(0, len(data), len(_ZEROS)):
                piece = bytes(data[at : at + len(_ZEROS)])
                if piece == _ZEROS:
                    file.seek(len(piece), os.SEEK_CUR)
                else:
                    file.write(piece)
            file.truncate(len(data))
            os.fsync(fd)
    except OSError as error:
        raise storage_error(path, "written", error) from None
    return FileEntry(path.name, len(data), hashlib.sha256(data).hexdigest())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, _FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _not_plain(path: Path) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{path}: expected a plain file in the checkpoint, found something that may lead out of it"
    )
