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
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from vmferry.errors import ImageLocked, StorageError, UsageError

from .image import Extent
from .nbd.storage import open_export
from .raw import drop_cache
from .storage import Access, Views

_EXPORT: Final = "image"
_START: Final = 60.0
"""Seconds for the daemon to open the image."""
_END: Final = 60.0
"""Seconds for it to write what the format writes at its end."""
_WORDS: Final = 2000
"""How much of the end of its output goes into an error."""


class DaemonStorage:
    """The image of QEMU's block driver *driver* (``qcow2``, ``vmdk``, ...) in the file *path*."""

    uncached: Final = False

    def __init__(self, path: Path, driver: str, *, read_only: bool, direct: bool) -> None:
        self.path: Final = path
        self.read_only: Final = read_only
        self._driver: Final = driver
        self._direct: Final = direct

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
        return self._start(read_only=self.read_only, force_share=False)

    def look(self) -> Access:
        """See :meth:`Storage.look`."""
        if not self.read_only:
            os.close(os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
        return self._start(read_only=True, force_share=True)

    def _start(self, *, read_only: bool, force_share: bool) -> Access:
        is_device = stat.S_ISBLK(self.path.stat().st_mode)
        node = {
            "driver": self._driver,
            "node-name": _EXPORT,
            "read-only": read_only,
            "force-share": force_share,
            "discard": "unmap",
            "cache": {"direct": self._direct},
            "file": {
                "driver": "host_device" if is_device else "file",
                "filename": str(self.path.absolute()),
            },
        }
        return _DaemonAccess(self.name, node, read_only=read_only)


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


def _start(name: str, node: dict[str, object], *, writable: bool) -> tuple[_Process, socket.socket]:
    """A daemon, and a connection to it, which nobody else can have: its socket has no name left."""
    program, guard = shutil.which("qemu-storage-daemon"), shutil.which("setpriv")
    if program is None or guard is None:
        missing = "setpriv (util-linux)" if program else "qemu-storage-daemon"
        raise UsageError(
            f"{name}: a {node['driver']} image needs {missing}, which cannot be found; it comes "
            "with QEMU (Debian: qemu-system-common)"
        )
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
            *(guard, "--pdeathsig", "KILL", program),
            *("--blockdev", json.dumps(node)),
            *("--nbd-server", json.dumps({"addr": address, "max-connections": 1})),
            *("--export", json.dumps(export)),
        ]
        process = _Process(command, listener.fileno())
        undo_connection.pop_all()
    return process, connection


class _Process:
    """A process that does not outlive this one, and the thread that keeps it.

    The kernel kills it when the thread that started it ends (``PR_SET_PDEATHSIG``), which
    therefore waits for it.
    """

    def __init__(self, command: Sequence[str], inherited: int) -> None:
        self._output = os.memfd_create("output", os.MFD_CLOEXEC)
        self._started = Future[subprocess.Popen[bytes]]()
        self._keeper = threading.Thread(
            target=self._keep, args=(command, inherited), name="image daemon", daemon=True
        )
        self._keeper.start()
        try:
            self._process = self._started.result()
        except BaseException:
            os.close(self._output)
            raise

    def _keep(self, command: Sequence[str], inherited: int) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(inherited,),
                start_new_session=True,
            )
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._started.set_exception(error)
            return
        self._started.set_result(process)
        process.wait()

    def last_words(self) -> str:
        """Why it ended, if it did."""
        self._keeper.join(1)
        if self._keeper.is_alive():
            return ""
        words = self._said()
        return words or f"qemu-storage-daemon ended with status {self._process.returncode}"

    def end(self) -> str:
        """Have it end by itself; its complaint, if there was one.  Idempotent."""
        if self._output < 0:
            return ""
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._keeper.join(_END)
        late = self._keeper.is_alive()
        words = "qemu-storage-daemon did not end in time" if late else self._said()
        status = self._process.returncode
        self.kill()
        return words or (f"qemu-storage-daemon ended with status {status}" if status else "")

    def kill(self) -> None:
        """Have it ended.  Idempotent."""
        if self._output < 0:
            return
        with suppress(ProcessLookupError):
            self._process.kill()
        self._keeper.join()
        os.close(self._output)
        self._output = -1

    def _said(self) -> str:
        """The end of its output, without the options in it, on one line."""
        size = os.fstat(self._output).st_size
        text = os.pread(self._output, _WORDS, max(size - _WORDS, 0)).decode(errors="replace")
        lines = (line.rpartition("}: ")[2].strip() for line in text.splitlines())
        return "; ".join(line for line in lines if line)
