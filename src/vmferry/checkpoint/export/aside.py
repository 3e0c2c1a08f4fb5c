"""A new file that appears under its name when it is complete, and not before."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmferry.errors import StorageError, storage_error

PREFIX: Final = ".vmferry-"
"""How names begin of what stands beside a new file until that is complete."""

_NO_LINKS: Final = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty file beside *path*, readable for its owner only, that becomes *path* at the end.

    Whoever fills it makes its content durable.  It is removed where the block is left by an
    exception.  Raises :class:`StorageError` where *path* exists, also if it came meanwhile.
    """
    if os.path.lexists(path):
        raise _exists(path)
    try:
        fd, name = tempfile.mkstemp(prefix=PREFIX, dir=path.parent)
        os.close(fd)
    except OSError as error:
        raise storage_error(path, "created", error) from None
    aside = Path(name)
    try:
        yield aside
        try:
            _publish(aside, path)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            raise storage_error(path, "completed", error) from None
    finally:
        aside.unlink(missing_ok=True)


def _exists(path: Path) -> StorageError:
    return StorageError(f"{path}: exists already; choose a new name")


def _publish(aside: Path, path: Path) -> None:
    """Give the file its name, without taking that from another file where the system can do so."""
    try:
        path.hardlink_to(aside)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        aside.rename(path)
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
