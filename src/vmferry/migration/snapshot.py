"""A stopped machine in a file, as the stream that would have gone over a network.

A file appears under its name when it is complete and on stable storage, and not before; what had
the name until then is replaced at once.  Nothing of that is promised by file systems that do not
promise it of ``rename``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Final

from vmferry.errors import StorageError, StreamError
from vmferry.wire.reader import StreamReader, Tolerate

from .loading import Events, load_stream
from .saving import Machine, save_stream

_BUFFER: Final = 1 << 20


def save(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Save *machine*, which does not run meanwhile, to the file *path*, for the owner only.

    Where that fails, what *path* was before is as it was.  Raises
    :class:`~vmferry.errors.UsageError` for a machine that cannot be migrated,
    :class:`~vmferry.errors.StateError` for a state that does not fit its declaration, and
    :class:`~vmferry.errors.StorageError`.
    """
    target = Path(path)
    machine.registry.check_migratable()
    try:
        descriptor, name = tempfile.mkstemp(prefix=".vmferry-", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb", _BUFFER) as file:
                save_stream(machine, file.write)
                file.flush()
                os.fsync(descriptor)
            Path(name).replace(target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be saved: {error.strerror}") from error


def load(machine: Machine, path: str | os.PathLike[str], *, may_lack: Collection[str] = ()) -> None:
    """Load the file *path* into *machine*, which is of the same kind and does not run.

    Every device of the machine has to be in the file, except for sections named in *may_lack*,
    and nothing else may be.  Raises :class:`~vmferry.errors.StreamError` for what does not fit:
    then the machine is as it was, unless a ``post_load`` or an iterative handler was what failed,
    and the error says so.
    """
    source = Path(path)
    try:
        with source.open("rb", 0) as file:
            if not file.seekable():
                raise StorageError(f"{source}: expected a file, found something that cannot seek")
            load_stream(machine, lambda: _events(file, str(source)), may_lack=may_lack)
    except OSError as error:
        raise StorageError(f"{source}: cannot be loaded: {error.strerror}") from error


def _events(file: BinaryIO, name: str) -> Events:
    """The events of the stream in *file*, which holds nothing else."""
    file.seek(0)
    reader = StreamReader(channel=name, tolerate=Tolerate.NO_RAM, framed=True)
    while not reader.finished:
        reader.buffer.received(file.readinto(reader.buffer.room()))  # type: ignore[attr-defined]
        for event in reader.events():
            yield event, reader.buffer.offset
    extra = len(reader.buffer) or len(file.read(1))
    if extra:
        raise StreamError(
            "the end of the file behind the stream",
            "something else",
            channel=name,
            offset=reader.buffer.offset,
        )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
