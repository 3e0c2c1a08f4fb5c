"""One guest that is moved from process to process, with all that it says and leaves behind."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Final, Self

from tests.soak.choices import Choice, choose, machine
from vmferry.demo import unbroken
from vmferry.errors import PeerError, TransportError
from vmferry.machines import DiskConfig
from vmferry.machines.guest.console import Heartbeat
from vmferry.machines.guest.journal import read_journal
from vmferry.qemu import QmpError
from vmferry.qemu.machine_process import MachineProcess

LONG: Final = 120.0
"""Seconds for what takes less than one where there is nothing else to do."""
ENOUGH: Final = 1.5
"""Seconds after which a migration is helped to its end."""

_ARRIVED: Final = frozenset({"completed", "sent"})
_ENDS: Final = _ARRIVED | {"failed", "cancelled"}
_RELIEF: Final = {"max-bandwidth": 0, "downtime-limit": 2000, "avail-switchover-bandwidth": 0}
_RANGE: Final = {"x-vmferry-downtime-ceiling": 1000, "x-vmferry-downtime-step": 200}


@dataclass(frozen=True, slots=True)
class Station:
    """A process on the way, and the numbers of its ends of two socket pairs.

    The other end of ``outgoing`` is the ``arriving`` of the process that was started next.
    """

    number: int
    process: MachineProcess
    outgoing: int
    arriving: int

    def query(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.process.qmp.execute("query-migrate")
        return answer

    @property
    def run_state(self) -> str:
        return str(self.process.qmp.execute("query-status")["status"])


@dataclass(frozen=True, slots=True)
class Move:
    """An attempt, and what became of it: the status in the end, and the downtime if it moved."""

    choice: Choice
    status: str
    rounds: int
    stood_still: float | None

    @property
    def has_arrived(self) -> bool:
        return self.status in _ARRIVED

    def __str__(self) -> str:
        said = [self.status]
        if self.rounds:
            said.append(f"{self.rounds} rounds")
        if self.stood_still is not None:
            said.append(f"stood still for {self.stood_still * 1e3:.1f} ms")
        return f"{', '.join(said)}: {self.choice}"


class Journey:
    """A guest made and moved by chance, inside a ``with`` block; it runs at first.

    *kind* is that of every host, or ``mixed`` for one of KVM and Unicorn each time.  *form* is the
    format of the image that it has its journal on; if it is not given, chance says, also whether
    there is one.
    """

    def __init__(
        self,
        rng: Random,
        kind: str,
        directory: Path,
        *,
        form: str | None = None,
        may_cancel: bool = True,
    ) -> None:
        self._rng = rng
        self._directory = directory
        self._may_cancel = may_cancel
        self._there: socket.socket | None = None
        self._started = 0
        self._cleanup = ExitStack()
        self._said = b""
        self._kinds = ["kvm", "unicorn"] if kind == "mixed" else [kind]
        self.config = replace(machine(rng, self._kinds[0]), disk=self._disk(form))

    def __enter__(self) -> Self:
        with self._cleanup as cleanup:
            self._here = self._start()
            self._next = self._start()
            self._here.process.console.wait_filled(LONG)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def moves(self) -> Iterator[Move]:
        """Attempts without end; each that has moved the machine is followed by a look at it."""
        while True:
            has_pair = self._next.number == self._here.number + 1
            choice = choose(
                self._rng,
                may_cancel=self._may_cancel,
                has_pair=has_pair,
                has_record=self.config.owner_store is not None,
            )
            yield self._attempt(choice)

    def _disk(self, form: str | None) -> tuple[DiskConfig, ...]:
        """An image that all the processes share, or none."""
        kind = form or self._rng.choice(["raw", "qcow2", ""])
        if not kind:
            return ()
        image = self._directory / f"disk.{kind}"
        subprocess.run(["qemu-img", "create", "-q", "-f", kind, image, "64k"], check=True)
        return (DiskConfig(file=str(image), format=kind),)

    def finish(self) -> int:
        """Look at all there is; the number of heartbeats."""
        self._look(self._here)
        self._leave(self._here)
        return self._check_journal()

    def _check_journal(self, *more: Station) -> int:
        """Hold what is on the disk against what was said, also by *more*; how often."""

        def heartbeats() -> int:
            said = (bytes(station.process.said) for station in more)
            return len(unbroken(self._said + b"".join(said)))

        lasts = [_last_record(disk, self._directory / "content") for disk in self.config.disk]
        last = max(lasts, default=-1)
        # What a machine has said comes a little later, through a pipe.
        _wait(lambda: heartbeats() > last, lambda: f"{last}, {heartbeats()} heartbeats")
        assert not lasts or heartbeats() <= last + 4, f"{last}, {heartbeats()} heartbeats"
        return heartbeats()

    # Processes

    def _start(self) -> Station:
        here, there = socket.socketpair()
        arriving = self._there
        kept = [one.fileno() for one in (here, arriving) if one is not None]
        process = MachineProcess(
            replace(self.config, kind=self._rng.choice(self._kinds)),
            incoming="defer" if self._started else None,
            timeout=LONG,
            pass_fds=kept,
        )
        self._cleanup.enter_context(process)
        if arriving is not None:
            arriving.close()
        self._there = there
        self._cleanup.callback(there.close)
        self._started += 1
        with here:
            return Station(self._started, process, here.fileno(), kept[-1])

    def _leave(self, station: Station) -> None:
        """End a process whose guest has gone on elsewhere, or to nowhere."""
        station.process.quit()
        self._said += bytes(station.process.said)

    # Moves

    def _attempt(self, choice: Choice) -> Move:
        here, there = self._here, self._next
        before = here.process.console.wait_beat(LONG)
        if choice.is_stopped:
            here.process.qmp.execute("stop")
        self._settings(here, choice)
        uris = self._uris(choice.transport, here, there)
        if choice.transport != "file":
            there.process.qmp.execute("migrate-incoming", {"uri": uris[1]})
            uris = self._address(there, uris[0]), uris[1]
        here.process.qmp.execute("migrate", {"uri": uris[0]})
        end = self._led_to_its_end(here, choice)
        if choice.transport == "file" and end["status"] == "sent":
            there.process.qmp.execute("migrate-incoming", {"uri": uris[1]})
        rounds = int(end.get("ram", {}).get("dirty-sync-count", 0))
        arrived = end["status"] in _ARRIVED
        stood_still = self._arrived(choice, before) if arrived else self._stayed(choice, end)
        return Move(choice, end["status"], rounds, stood_still)

    def _settings(self, station: Station, choice: Choice) -> None:
        states = [{"capability": key, "state": on} for key, on in choice.capabilities.items()]
        station.process.qmp.execute("migrate-set-capabilities", {"capabilities": states})
        station.process.qmp.execute("migrate-set-parameters", choice.parameters | _RANGE)

    def _uris(self, transport: str, here: Station, there: Station) -> tuple[str, str]:
        """For the source, and for the destination."""
        path = f"{self._directory}/{self._started}"
        match transport:
            case "unix" | "file":
                return (f"{transport}:{path}",) * 2
            case "tcp":
                return "", "tcp:127.0.0.1:0"
            case "fd":
                return f"fd:{here.outgoing}", f"fd:{there.arriving}"
        os.mkfifo(path)
        return f"exec:cat >{path}", f"exec:cat {path}"

    def _address(self, there: Station, uri: str) -> str:
        """*uri*, or where the destination listens."""
        if uri:
            return uri
        [address] = there.query()["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    def _led_to_its_end(self, here: Station, choice: Choice) -> dict[str, Any]:
        """Cancel it, let it go on from its pause, or help it, until it has ended."""
        began = time.monotonic()
        relieved = False
        while (now := here.query())["status"] not in _ENDS:
            spent = time.monotonic() - began
            if spent > LONG:
                raise AssertionError(f"it does not end: {now}")
            if now["status"] == "pre-switchover":
                self._switch_over(here, choice)
            elif choice.cancel is not None and spent >= choice.cancel:
                here.process.qmp.execute("migrate_cancel")
            elif spent > ENOUGH and not relieved:
                here.process.qmp.execute("migrate-set-parameters", _RELIEF)
                relieved = True
            time.sleep(0.003)
        return now

    def _switch_over(self, here: Station, choice: Choice) -> None:
        if choice.refuses_switchover:
            here.process.qmp.execute("migrate_cancel")
            return
        with suppress(QmpError):  # told twice
            here.process.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    # Afterwards

    def _arrived(self, choice: Choice, before: Heartbeat) -> float | None:
        """The machine is there, it goes on, and what was left behind is right as well."""
        here, there = self._here, self._next
        wanted = "paused" if choice.is_stopped else "running"
        _wait(lambda: there.run_state == wanted, lambda: f"{there.run_state}, {there.query()}")
        assert here.run_state == "postmigrate"
        if choice.is_stopped:
            there.process.check()
            there.process.qmp.execute("cont")
        console = there.process.console
        _wait(lambda: console.count >= 2, lambda: f"{console.count} heartbeats")
        stood_still = console.beats[-1].stood_still(before) / 1e9
        assert console.beats[-1].time > before.time
        here.process.check()
        self._leave(here)
        if self._rng.random() < 0.5:
            self._look(there)
        else:
            there.process.qmp.execute("stop")
        self._check_journal(there)
        there.process.qmp.execute("cont")
        self._here, self._next = there, self._start()
        return None if choice.is_stopped else stood_still

    def _stayed(self, choice: Choice, end: dict[str, Any]) -> None:
        """The machine runs where it was, and nowhere else."""
        here, there = self._here, self._next
        if end["status"] == "failed":
            assert "given up" in end.get("error-desc", ""), f"{end}: {choice}"
        else:
            assert choice.cancel is not None or choice.refuses_switchover
        if choice.is_stopped:
            assert here.run_state == "paused"
            here.process.qmp.execute("cont")
        here.process.console.wait_beat(LONG)
        assert here.run_state == "running"
        if self._rng.random() < 0.3:
            self._look(here)
            here.process.qmp.execute("cont")
        # It says why it ends, or waits for another source.
        with suppress(TransportError, PeerError):
            assert there.run_state == "inmigrate"
            there.process.quit()
        assert not there.process.said
        self._next = self._start()

    def _look(self, station: Station) -> None:
        """Stop the machine, and look at every page of it."""
        station.process.qmp.execute("stop")
        station.process.check()


def _last_record(disk: DiskConfig, content: Path) -> int:
    """The last record of the journal, which QEMU reads into *content*; fails for a fault.

    The image may be in use: its machine stands still.
    """
    image = ["-U", "-f", disk.format, disk.file]
    if disk.format != "raw":
        subprocess.run(["qemu-img", "check", "-q", *image], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", *image, content], check=True)
    found = read_journal(content.read_bytes())
    assert not found.faults, found.faults
    return found.last


def _wait(met: Callable[[], bool], found: Callable[[], str]) -> None:
    deadline = time.monotonic() + LONG
    while not met():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {LONG:g} s, found {found()}")
        time.sleep(0.01)
