"""Images in every format that QEMU knows, by a ``qemu-storage-daemon`` for as long as one is open.

An access is a process: it is started to activate the image, exports it by NBD to this process
alone, and to inactivate it is flushed and ended.  Once it has ended there is nothing left that
could write to the image, not even to its header.

The kernel kills it when this process is gone, as a power cut would: what was flushed is there, and
nothing is written late.  A signal from the terminal does not reach it.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from vmferry.errors import ImageLocked, StorageError

from .daemon_process import DaemonProcess, daemon_command
from .image import Extent
from .nbd.storage import open_export
from .raw import Place, drop_cache
from .storage import Access, Views

_EXPORT: Final = "image"
_START: Final = 60.0
"""Seconds for the daemon to open the image."""


class DaemonStorage:
    """The image of QEMU's block driver *driver* (``qcow2``, ``vmdk``, ...) in the file *path*."""

    uncached: Final = False

    def __init__(self, path: Path, driver: str, *, read_only: bool, direct: bool) -> None:
        self.path: Final = path
        self.read_only: Final = read_only
        self._driver: Final = driver
        self._direct: Final = direct
        self._place: Final = Place(path)

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def open(self) -> Access:
        """See :meth:`Storage.open`; the daemon takes QEMU's locks."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            drop_cache(fd)
        finally:
            os.close(fd)
        access = self._start(read_only=self.read_only, force_share=False)
        self._place.note()
        return access

    def check_place(self) -> None:
        """See :meth:`Storage.check_place`."""
        self._place.check()

    def look(self) -> Access:
        """See :meth:`Storage.look`."""
        if not self.read_only:
            os.close(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        return self._start(read_only=True, force_share=True)

    def _start(self, *, read_only: bool, force_share: bool) -> Access:
        node = block_node(_EXPORT, self.path, self._driver, direct=self._direct)
        node |= {"read-only": read_only, "force-share": force_share}
        return _DaemonAccess(self.name, node, read_only=read_only)


def block_node(name: str, path: Path, driver: str, *, direct: bool = False) -> dict[str, object]:
    """QEMU's options for a node *name* on the image in the file *path*."""
    is_device = stat.S_ISBLK(path.stat().st_mode)
    return {
        "driver": driver,
        "node-name": name,
        "discard": "unmap",
        "cache": {"direct": direct},
        "file": {
            "driver": "host_device" if is_device else "file",
            "filename": str(path.absolute()),
        },
    }


class _DaemonAccess:
    """The daemon, and an access to its export; each error says whether the daemon has died."""

    def __init__(self, name: str, node: dict[str, object], *, read_only: bool) -> None:
        self._name = name
        with ExitStack() as undo:
            self._process, connection = _start(name, node, writable=not read_only)
            undo.callback(self._process.kill)
            with self._explained():
                self._export = open_export(connection, name, _EXPORT, read_only=read_only)
            connection.settimeout(None)  # a flush takes what it takes; if it dies, this ends
            undo.pop_all()

    @property
    def size(self) -> int:
        return self._export.size

    def read(self, offset: int, into: Views) -> None:
        with self._explained():
            self._export.read(offset, into)

    def write(self, offset: int, data: Views, *, durable: bool = False) -> None:
        with self._explained():
            self._export.write(offset, data, durable=durable)

    def flush(self) -> None:
        with self._explained():
            self._export.flush()

    def discard(self, offset: int, length: int) -> None:
        with self._explained():
            self._export.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        with self._explained():
            self._export.write_zeroes(offset, length, unmap=unmap)

    def resize(self, size: int) -> None:
        self._export.resize(size)

    def extents(self, offset: int, length: int, *, own: bool = False) -> Sequence[Extent]:
        with self._explained():
            return self._export.extents(offset, length, own=own)

    def close(self) -> None:
        """End the daemon, and see whether it wrote all that it had to."""
        try:
            self._export.close()
        finally:
            complaint = self._process.end()
        if complaint:
            raise StorageError(f"{self._name}: {complaint}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            if words := self._process.last_words():
                kind = (
                    ImageLocked if "Is another process using the image" in words else StorageError
                )
                raise kind(f"{self._name}: {words}") from error
            raise


def _start(
    name: str, node: dict[str, object], *, writable: bool
) -> tuple[DaemonProcess, socket.socket]:
    """A daemon, and a connection to it, which nobody else can have: its socket has no name left."""
    daemon = daemon_command(f"{name}: a {node['driver']} image")
    export = {
        "type": "nbd",
        "id": _EXPORT,
        "node-name": _EXPORT,
        "writable": writable,
        "allocation-depth": True,
    }
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        connection = socket.socket(socket.AF_UNIX)
        undo_connection = undo.enter_context(ExitStack())
        undo_connection.callback(connection.close)
        with tempfile.TemporaryDirectory(prefix="vmferry-") as directory:
            path = f"{directory}/nbd"
            listener.bind(path)
            listener.listen(1)
            connection.connect(path)
        connection.settimeout(_START)
        address = {"type": "fd", "str": str(listener.fileno())}
        command = [
            *daemon,
            *("--blockdev", json.dumps(node)),
            *("--nbd-server", json.dumps({"addr": address, "max-connections": 1})),
            *("--export", json.dumps(export)),
        ]
        process = DaemonProcess(command, listener.fileno())
        undo_connection.pop_all()
    return process, connection
