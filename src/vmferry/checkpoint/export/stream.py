"""A stream from a checkpoint, and a checkpoint from a stream: sending and receiving over a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.checkpoint.transfer import send
from vmferry.errors import StorageError, UsageError, printable, storage_error
from vmferry.migration.progress import Report

from .aside import PREFIX

STANDARD_INPUT: Final = "-"

_OFFSET: Final = ",offset="
"""What ends the path in a ``file:`` URI."""


def write_stream(checkpoint: Checkpoint, path: Path, report: Report | None) -> None:
    """Fill *path* with what QEMU reads with ``-incoming exec:'cat path'``."""
    send(checkpoint, _uri(path), progress=report)


@contextmanager
def opened(
    source: str | os.PathLike[str], beside: Path, receive: Callable[[str, str], Checkpoint]
) -> Iterator[Checkpoint]:
    """The checkpoint *source*; a stream becomes one, in the directory *beside*, for the time being.

    A stream is a file, or standard input where *source* is ``-``; *receive* takes it from a URI
    into a directory.
    """
    if source != STANDARD_INPUT and Path(source).is_dir():
        with Checkpoint(source) as checkpoint:
            yield checkpoint
        return
    if source != STANDARD_INPUT and not Path(source).exists():
        raise StorageError(f"{source}: no such stream file or checkpoint directory")
    uri = STANDARD_INPUT if source == STANDARD_INPUT else _uri(Path(source))
    try:
        directory = tempfile.mkdtemp(prefix=PREFIX, dir=beside)
    except OSError as error:
        raise storage_error(beside, "written to", error) from None
    try:
        with receive(uri, directory) as checkpoint:
            yield checkpoint
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _uri(path: Path) -> str:
    if _OFFSET in str(path):
        raise UsageError(f"{printable(str(path))}: a path with {_OFFSET!r} in it cannot be used")
    return f"file:{path}"
