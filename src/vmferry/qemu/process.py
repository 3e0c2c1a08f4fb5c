"""A QEMU of our own: started with a monitor and a serial port, driven, and ended for certain.

QMP and the first serial port are socket pairs, inherited by QEMU: nothing has to appear in the file
system, there is no moment in which output is lost, and a QEMU that cannot start is seen at once as
the end of the connection, with what it wrote to stderr as the reason.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vmferry.errors import PeerError, TransportError, UsageError, VmferryError
from vmferry.qemu.qmp import Qmp

_FINAL: Final = frozenset({"completed", "failed", "cancelled", "postcopy-paused"})
_POLL: Final = 0.005  # seconds between two questions for the state of a migration
_STDERR: Final = 2000  # how much of the end of QEMU's stderr goes into an error


def find_qemu(target: str = "x86_64") -> str:
    """The path of ``qemu-system-<target>``.

    For x86_64 the environment variable VMFERRY_QEMU names another one.
    """
    name = f"qemu-system-{target}"
    wanted = os.environ.get("VMFERRY_QEMU") if target == "x86_64" else None
    found = shutil.which(wanted or name)
    if found is None:
        where = f"VMFERRY_QEMU names {wanted}, which" if wanted else f"{name}"
        raise UsageError(f"{where} cannot be found; install QEMU or set VMFERRY_QEMU to its path")
    return found


class QemuProcess:
    """One QEMU, running inside a ``with`` block.

    *arguments* describe the machine (``-machine``, ``-m``, drives, ``-incoming defer``, ...); the
    monitor, the first serial port and the absence of a display are added.  *timeout* (seconds)
    bounds the start and each command.  *pass_fds* are inherited under their numbers.

    Inside the block: ``qmp``, a session; ``serial``, a socket, the other end of the first serial
    port; ``directory``, a private directory for sockets and files, gone afterwards.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        target: str = "x86_64",
        timeout: float = 30.0,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._arguments = [str(argument) for argument in arguments]
        self._target = target
        self._timeout = timeout
        self._pass_fds = tuple(pass_fds)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with self._cleanup as cleanup:  # undone here, unless everything below succeeds
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _start(self, cleanup: ExitStack) -> None:
        program = find_qemu(self._target)
        temporary = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-qemu-"))
        self.directory: Path = Path(temporary)
        monitor, monitor_end = socket.socketpair()
        self.serial, serial_end = socket.socketpair()
        cleanup.callback(self.serial.close)
        cleanup.callback(monitor.close)
        with monitor_end, serial_end, (self.directory / "stderr").open("wb") as stderr:
            self.command: list[str] = [
                program,
                *("-no-user-config", "-display", "none"),
                *("-chardev", f"socket,id=vmferry-qmp,fd={monitor_end.fileno()}"),
                *("-mon", "chardev=vmferry-qmp,mode=control"),
                *("-chardev", f"socket,id=vmferry-serial,fd={serial_end.fileno()}"),
                *("-serial", "chardev:vmferry-serial"),
                *self._arguments,
            ]
            try:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    pass_fds=(monitor_end.fileno(), serial_end.fileno(), *self._pass_fds),
                )
            except OSError as exc:
                raise UsageError(f"cannot start {program}: {exc.strerror}") from exc
        cleanup.callback(self.stop)
        try:
            self.qmp = Qmp(monitor, timeout=self._timeout)
        except VmferryError as exc:
            raise self._explained(exc) from exc

    @property
    def pid(self) -> int:
        """The process id of this QEMU."""
        return self._process.pid

    def stop(self) -> int:
        """End QEMU, by force if it does not listen, and return its exit status.  Idempotent."""
        return ended(self._process, 5)

    def wait_exit(self, timeout: float | None = None) -> int:
        """Wait until QEMU ends by itself; its exit status."""
        try:
            return self._process.wait(self._timeout if timeout is None else timeout)
        except subprocess.TimeoutExpired as exc:
            raise TransportError("QEMU did not end in time") from exc

    def stderr(self) -> str:
        """What QEMU wrote to its standard output and error so far."""
        return (self.directory / "stderr").read_text(errors="replace")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """As :meth:`Qmp.execute`; if QEMU has died, the error says what it wrote at the end."""
        try:
            return self.qmp.execute(command, arguments, timeout=timeout)
        except TransportError as exc:
            raise self._explained(exc) from exc

    def hmp(self, line: str, *, timeout: float | None = None) -> str:
        """The output of a command of the human monitor."""
        output = self.execute("human-monitor-command", {"command-line": line}, timeout=timeout)
        return str(output)

    def save_memory(self, path: Path, start: int, size: int) -> None:
        """Write *size* bytes of guest-physical memory from *start* to *path*, with ``pmemsave``."""
        self.execute("pmemsave", {"val": start, "size": size, "filename": str(path)})

    def prepare_migration(
        self,
        capabilities: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        """Turn *capabilities* on and set *parameters*; the others stay as they are."""
        if capabilities:
            states = [{"capability": name, "state": True} for name in capabilities]
            self.execute("migrate-set-capabilities", {"capabilities": states})
        if parameters:
            self.execute("migrate-set-parameters", parameters)

    def migrate(
        self,
        uri: str,
        *,
        capabilities: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        """Start to migrate to *uri*; see :meth:`wait_migration`."""
        self.prepare_migration(capabilities, parameters)
        self.execute("migrate", {"uri": uri})

    def incoming(
        self,
        uri: str,
        *,
        capabilities: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
    ) -> None:
        """Listen for a migration at *uri*; the machine was started with ``-incoming defer``."""
        self.prepare_migration(capabilities, parameters)
        self.execute("migrate-incoming", {"uri": uri})

    def query_migrate(self) -> dict[str, Any]:
        """QEMU's view of the migration, ``{}`` before the first one."""
        answer: dict[str, Any] = self.execute("query-migrate")
        return answer

    def wait_migration(self, status: str = "completed", timeout: float = 60.0) -> dict[str, Any]:
        """Wait until the migration has *status*; the whole answer of ``query-migrate``.

        Raises PeerError when it ends in another one, TransportError after *timeout* seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            answer = self.query_migrate()
            found = answer.get("status", "none")
            if found == status:
                return answer
            if found in _FINAL:
                reason = answer.get("error-desc") or self._last_words() or "QEMU gives no reason"
                raise PeerError(f"expected the migration to be {status}, found {found}: {reason}")
            if time.monotonic() > deadline:
                raise TransportError(f"the migration is still {found}, not {status}")
            time.sleep(_POLL)

    def wait_running(self, timeout: float = 30.0) -> None:
        """Wait until the virtual CPUs run."""
        deadline = time.monotonic() + timeout
        while not (answer := self.execute("query-status"))["running"]:
            if time.monotonic() > deadline:
                raise TransportError(f"the machine is still {answer['status']}, not running")
            time.sleep(_POLL)

    def _last_words(self) -> str:
        return self.stderr()[-_STDERR:].strip()

    def _explained(self, exc: VmferryError) -> VmferryError:
        """*exc*, or if QEMU has ended, an error with its exit status and its last words."""
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return exc
        return PeerError(f"QEMU ended with status {status}: {self._last_words() or 'no message'}")


def ended(process: subprocess.Popen[bytes], patience: float) -> int:
    """End *process*, by force if it does not within *patience* seconds; its exit status."""
    process.terminate()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
