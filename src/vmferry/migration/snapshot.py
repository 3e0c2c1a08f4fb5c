"""A stopped machine in a file, as the stream that would have gone over a network.

A file appears under its name when it is complete and on stable storage, and not before; what had
the name until then is replaced at once.  Nothing of that is promised by file systems that do not
promise it of ``rename``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import BinaryIO, Final

from vmferry.errors import StorageError, StreamError
from vmferry.wire.devices import Decode
from vmferry.wire.reader import StreamReader, Tolerate

from .loading import Events, load_stream
from .saving import Machine, save_stream

_BUFFER: Final = 1 << 20
_READ: Final = 16 << 20


def save(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Save *machine*, which does not run meanwhile, to the file *path*, for the owner only.

    Where that fails, what *path* was before is as it was.  Raises
    :class:`~vmferry.errors.UsageError` for a machine that cannot be migrated,
    :class:`~vmferry.errors.StateError` for a state that does not fit its declaration, and
    :class:`~vmferry.errors.StorageError`.
    """
    machine.registry.check_migratable()
    with _replacing(Path(path)) as write:
        save_stream(machine, write)


def load(machine: Machine, path: str | os.PathLike[str], *, may_lack: Collection[str] = ()) -> None:
    """Load the file *path* into *machine*, which is of the same kind and does not run.

    Every device of the machine has to be in the file, except for sections named in *may_lack*,
    and nothing else may be.  Raises :class:`~vmferry.errors.StreamError` for what does not fit:
    then the machine is as it was, unless a ``post_load`` or an iterative handler was what failed,
    and the error says so.
    """
    source = Path(path)
    with _storing(source, "loaded"):
        file = source.open("rb", 0)
    with file:
        if not file.seekable():
            raise StorageError(f"{source}: expected a file, found something that cannot seek")
        load_stream(machine, lambda decode: _events(file, source, decode), may_lack=may_lack)


def _events(file: BinaryIO, path: Path, decode: Decode) -> Events:
    """The events of the stream in *file*, which holds nothing else."""
    with _storing(path, "loaded"):
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
    reader = StreamReader(
        channel=str(path),
        tolerate=Tolerate.NO_RAM,
        framed=True,
        decode=decode,
        capacity=min(size, _READ) + _BUFFER,  # so that it seldom has to grow
    )
    while not reader.finished:
        with _storing(path, "loaded"):
            count = file.readinto(reader.buffer.room())  # type: ignore[attr-defined]
        reader.buffer.received(count)
        for event in reader.events():
            yield event, reader.buffer.offset
    with _storing(path, "loaded"):
        extra = len(reader.buffer) or len(file.read(1))
    if extra:
        raise StreamError(
            "the end of the file behind the stream",
            "something else",
            channel=str(path),
            offset=reader.buffer.offset,
        )


@contextmanager
def _replacing(target: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that writes to a new file, which becomes *target* at the end of the block."""
    with _storing(target, "saved"):
        descriptor, name = tempfile.mkstemp(prefix=".vmferry-", dir=target.parent)
    aside = Path(name)

    def write(data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            raise _unstorable(target, "saved", error) from error

    try:
        # Only the raw file is closed, as a buffer would try once more to write what could not be.
        with os.fdopen(descriptor, "wb", 0) as raw:
            file = BufferedWriter(raw, _BUFFER)
            yield write
            with _storing(target, "saved"):
                file.flush()
                os.fsync(descriptor)
        with _storing(target, "saved"):
            aside.replace(target)
            _sync_directory(target.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _storing(path: Path, done: str) -> Iterator[None]:
    """Say what the file system did not let be *done*; what a device raises is not meant."""
    try:
        yield
    except OSError as error:
        raise _unstorable(path, done, error) from error


def _unstorable(path: Path, done: str, error: OSError) -> StorageError:
    return StorageError(f"{path}: cannot be {done}: {error.strerror}")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
