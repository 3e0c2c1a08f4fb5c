"""A process with a machine and its monitor: ``python -m tests.migration.hosted SOCKET ROLE``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry import TransportError
from vmferry.migration.control import Control
from vmferry.ownership.engine import Ownership
from vmferry.ownership.store import open_store
from vmferry.qemu.commands import Command
from vmferry.qemu.monitor import GREETING, machine_commands
from vmferry.qemu.qmp import Qmp
from vmferry.qemu.server import QmpServer

LONG = 30.0


def main(path: str, role: str) -> None:
    told_to_end = threading.Event()
    with PythonMachine() as machine:
        ownership = None
        if uri := os.environ.get("OWNERSHIP"):
            ownership = Ownership(
                open_store(uri),
                vm="vm",
                pause=lambda: paused(machine),
                resume=machine.resume,
                doubt=lambda why: control.doubted(why),  # noqa: PLW0108  (it comes to be below)
            )
        servers: list[QmpServer] = []
        control = Control(
            machine,
            notify=lambda event, data: tell(servers, event, data),
            ownership=ownership,
            awaited=role != "source",
        )
        if role == "source":
            if ownership is not None:
                ownership.claim()
            machine.fill().resume()
        elif ownership is not None:
            ownership.await_machine()
        commands = machine_commands(control) | {
            "x-steps": Command(lambda _: machine.steps, at_once=True),
            "x-drop": Command(lambda _: control.cancel_incoming()),
            "x-check": Command(lambda _: _check(machine)),
        }
        with QmpServer(path, commands, greeting=GREETING, leave=told_to_end.set) as server:
            servers.append(server)
            told_to_end.wait()
        control.close()
        if ownership is not None:
            machine.pause()
            ownership.close()


def tell(servers: list[QmpServer], event: str, data: dict[str, Any]) -> None:
    for server in servers:
        server.emit(event, data)


def paused(machine: PythonMachine) -> bool:
    ran = machine.running
    machine.pause()
    return ran


def _check(machine: PythonMachine) -> None:
    machine.pause()
    machine.check()


class Hosted:
    """The process of a machine, and a session with its monitor.

    *before* is what stands before its command.
    """

    def __init__(
        self,
        path: Path,
        role: str,
        *,
        fault: str = "",
        store: str = "",
        before: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.migration.hosted", str(path), role],
            env={**os.environ, "VMFERRY_FAULT": fault, "OWNERSHIP": store},
        )
        wait_until(self._connect, LONG)

    def _connect(self) -> bool:
        try:
            self.qmp = Qmp.connect(str(self.path), timeout=LONG)
        except TransportError:
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.qmp.close()
        self._process.kill()
        self._process.wait()

    def set(self, **parameters: object) -> None:
        named = {name.replace("_", "-"): value for name, value in parameters.items()}
        self.qmp.execute("migrate-set-parameters", named)

    def query(self) -> dict[str, Any]:
        answer = self.qmp.execute("query-migrate")
        assert isinstance(answer, dict)
        return answer

    def wait_for(self, *statuses: str) -> str:
        """Wait until the migration has one of these statuses."""
        wait_until(lambda: self.query().get("status") in statuses, LONG)
        return str(self.query()["status"])

    def wait_death(self) -> None:
        """Wait until the process was killed; it is left as a zombie."""
        state = Path(f"/proc/{self._process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "Z", LONG)

    def wait_frozen(self) -> None:
        state = Path(f"/proc/{self._process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T", LONG)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    @property
    def run_state(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def runs_on(self) -> None:
        """The machine goes on, and all of it is right."""
        wait_until(lambda: self.run_state == "running", LONG)
        before = self.qmp.execute("x-steps")
        wait_until(lambda: self.qmp.execute("x-steps") > before, LONG)
        self.qmp.execute("x-check")


if __name__ == "__main__":
    main(*sys.argv[1:])
