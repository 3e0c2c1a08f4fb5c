"""Disks of a machine that is awaited, served by NBD so that its source can fill them.

QEMU 7.2 ``qapi/block-export.json``: the commands by which a destination is made ready for mirrors.
A ``qemu-storage-daemon`` serves them, and has QEMU's locks on them meanwhile: a machine that comes
while they are served cannot have its disks, and stays with its source.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmferry.errors import UsageError, printable
from vmferry.images import Image
from vmferry.images.daemon import block_node
from vmferry.images.daemon_process import DaemonProcess, daemon_command
from vmferry.images.nbd.uri import SCHEMES

from .commands import Command
from .messages import Object
from .qmp import Qmp, QmpError

_START: Final = 60.0
"""Seconds for the daemon to start, and for each answer of it."""

_MOST: Final = 64
"""Exports."""


@dataclass(frozen=True, slots=True)
class Served:
    """A disk that can be served: its image, the file, and the driver of its format."""

    image: Image
    file: str
    driver: str


class Exports:
    """The NBD server of a machine with *disks*, by their names; they are served while *awaited*.

    *check* raises where they cannot be filled for another reason.
    """

    def __init__(
        self,
        disks: Mapping[str, Served],
        awaited: Callable[[], bool],
        check: Callable[[], None],
    ) -> None:
        self._disks = disks
        self._awaited = awaited
        self._check = check
        self._lock = threading.Lock()
        self._is_closed = False
        self._server: ExitStack | None = None
        self._qmp: Qmp | None = None
        self._exports: dict[str, str] = {}

    def commands(self) -> dict[str, Command]:
        """By name."""
        return {
            "nbd-server-start": self._command(self._start, required={"addr": dict}),
            "nbd-server-stop": self._command(lambda _: self._stop()),
            "block-export-add": self._command(
                self._add,
                required={"type": str, "id": str, "node-name": str, "writable": bool},
                optional={"name": str},
            ),
            "block-export-del": self._command(
                self._delete, required={"id": str}, optional={"mode": str}
            ),
        }

    def _command(
        self,
        run: Callable[[Object], None],
        required: Mapping[str, type] = {},
        optional: Mapping[str, type] = {},
    ) -> Command:
        """One of these at a time; a daemon that does not answer holds no other command."""

        def run_alone(given: Object) -> None:
            with self._lock:
                if self._is_closed:
                    raise UsageError("the machine ends")
                run(given)

        return Command(run_alone, required, optional, at_once=True)

    def close(self) -> None:
        """Serve nothing any more: what was written is in the files, whose locks are free."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _stop(self) -> None:
        server, self._server, self._qmp = self._server, None, None
        self._exports.clear()
        if server is not None:
            server.close()

    def _start(self, arguments: Object) -> None:
        if self._server is not None:
            raise UsageError("an NBD server is running already: nbd-server-stop ends it")
        command = daemon_command("serving disks by NBD")
        with ExitStack() as undo:
            here, there = socket.socketpair()
            undo.callback(here.close)
            with there:
                monitor = f"socket,id=monitor,fd={there.fileno()}"
                command += ["--chardev", monitor, "--monitor", "chardev=monitor"]
                process = DaemonProcess(command, there.fileno())
            undo.callback(process.end)
            qmp = Qmp(here, timeout=_START)
            qmp.execute("nbd-server-start", {"addr": arguments["addr"]})
            self._qmp, self._server = qmp, undo.pop_all()

    def _add(self, arguments: Object) -> None:
        disk, name = arguments["node-name"], arguments["id"]
        if arguments["type"] != "nbd":
            raise UsageError(f"expected an export of type nbd, not {printable(arguments['type'])}")
        served = self._disks.get(disk)
        if served is None:
            raise UsageError(f"there is no disk {printable(disk)}")
        if served.file.startswith(SCHEMES):
            raise UsageError(f"{served.image.name} is on an NBD server, which serves it already")
        if not self._awaited() or served.image.active:
            raise UsageError(f"{printable(disk)} is served only while its machine is awaited")
        if arguments["writable"] and served.image.read_only:
            raise UsageError(f"{printable(disk)} is read only")
        self._check()
        if name in self._exports:
            raise UsageError(f"there is an export {printable(name)} already")
        if len(self._exports) >= _MOST:
            raise UsageError(f"there are {_MOST} exports already, which is the most")
        qmp = self._running()
        if disk not in self._exports.values():
            qmp.execute("blockdev-add", block_node(disk, Path(served.file), served.driver))
        try:
            qmp.execute("block-export-add", arguments)
        except QmpError:
            self._release(qmp, disk)
            raise
        self._exports[name] = disk

    def _delete(self, arguments: Object) -> None:
        qmp, name = self._running(), arguments["id"]
        if name not in self._exports:
            raise UsageError(f"there is no export {printable(name)}")
        qmp.execute("block-export-del", arguments)
        qmp.wait_event("BLOCK_EXPORT_DELETED", timeout=_START)
        self._release(qmp, self._exports.pop(name))

    def _release(self, qmp: Qmp, disk: str) -> None:
        """Let the file go, if nothing serves it any more."""
        if disk not in self._exports.values():
            qmp.execute("blockdev-del", {"node-name": disk})

    def _running(self) -> Qmp:
        if self._qmp is None:
            raise UsageError("no NBD server is running: nbd-server-start starts one")
        return self._qmp
