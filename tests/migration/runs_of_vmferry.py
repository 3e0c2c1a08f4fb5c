"""Processes of ``vmferry run`` whose guest keeps a journal on a shared disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from tests.support.processes import is_frozen
from tests.transports.support import wait_until
from vmferry import TransportError
from vmferry.machines import DiskConfig, GuestConfig, MachineConfig
from vmferry.machines.guest.journal import read_journal
from vmferry.qemu.qmp import Qmp

LONG = 60.0
SIZE = 64 << 10


def config(path: Path, kind: str = "raw", **guest: Any) -> MachineConfig:
    """A machine with a journal on a fresh image."""
    image = path / f"disk.{kind}"
    if kind == "raw":
        with image.open("wb") as file:
            file.truncate(SIZE)
    else:
        command = ["qemu-img", "create", "-q", "-f", kind, str(image), str(SIZE)]
        subprocess.run(command, check=True)
    return MachineConfig(
        ram=4 << 20,
        guest=GuestConfig(working_set=256 << 10, rate=2000, heartbeat=0.002, **guest),
        disk=(DiskConfig(file=str(image), format=kind),),
    )


def afterwards(path: Path) -> int:
    """The number of the last record, by a reader that needs no lock; fails for a fault."""
    for _ in range(3):  # a guest that writes meanwhile may leave no whole picture
        found = read_journal((path / "disk.raw").read_bytes())
        if not found.faults:
            break
    assert not found.faults
    return found.last


def once_around(path: Path, before: bytes) -> None:
    """Wait until a guest that began anew has written over all that was there *before*."""
    disk = path / "disk.raw"

    def is_around() -> bool:
        data = disk.read_bytes()
        found = read_journal(data)
        return data[:512] != before[:512] and not found.faults and found.last >= SIZE // 512

    wait_until(is_around, LONG)


def goes_on(path: Path) -> None:
    """Somebody writes the journal, and nobody else does."""
    before = afterwards(path)
    wait_until(lambda: afterwards(path) > before, LONG)


class Process:
    """``vmferry run``, and a session with its monitor."""

    def __init__(self, file: Path, path: Path, *more: str, fault: str = "") -> None:
        command = [sys.executable, "-m", "vmferry", "run", str(file)]
        self._process = subprocess.Popen(
            [*command, "--qmp", str(path), *more, "--json"],
            env={**os.environ, "VMFERRY_FAULT": fault},
            stdout=subprocess.DEVNULL,
        )
        self._path = path
        wait_until(self._connect, LONG)

    def _connect(self) -> bool:
        with suppress(TransportError):
            self.qmp = Qmp.connect(str(self._path), timeout=LONG)
            return True
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.qmp.close()
        self._process.kill()
        self._process.wait()

    @property
    def run_state(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    @property
    def ownership(self) -> str:
        return str(self.query()["x-vmferry-ownership"])

    def query(self) -> dict[str, Any]:
        answer = self.qmp.execute("query-migrate")
        assert isinstance(answer, dict)
        return answer

    def status(self) -> str:
        return str(self.query().get("status", "none"))

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait_frozen(self) -> None:
        wait_until(lambda: is_frozen(self._process.pid), LONG)

    @property
    def has_disk(self) -> bool:
        """Whether it has the image open, and so could write it."""
        files = Path(f"/proc/{self._process.pid}/fd").iterdir()
        with suppress(FileNotFoundError):  # one that was closed meanwhile
            return any(file.readlink().name == "disk.raw" for file in files)
        return self.has_disk

    @property
    def lives(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait_death(self) -> None:
        assert self._process.wait(LONG) == -signal.SIGKILL

    def wait_end(self) -> None:
        """It gives up waiting for a machine, and ends as a QEMU does."""
        assert self._process.wait(LONG) > 0
