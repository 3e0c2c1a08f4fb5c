"""Machines of one test: one that is saved while it runs, others that it is resumed in.

The guest is a walker (:mod:`guests`): it never stops to write memory, and says so when it finds a
page that is not as it left it.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import vmferry
from guests import Serial, check_ram
from tests.support.capture import Scenario, finish_migration, keep_on_one_processor
from tests.transports.support import background
from vmferry.checkpoint.checkpoint import StoredPages
from vmferry.errors import PeerError
from vmferry.migration.destination import Destination
from vmferry.qemu import QemuProcess

PATIENCE = 60.0
"""Seconds for whatever takes a moment, on a machine that is busy with other things too."""

GUEST = (("pages", 512), ("hot", 128), ("fill", 256))
"""2 MiB that are looked at in each pass, half of it incompressible; a quarter is written."""

PC = Scenario(guest=GUEST, bandwidth=8 << 20)
"""Held until at most two pages are dirty: hardly ever, however little time the guest gets."""


@dataclass(frozen=True)
class Vm:
    """A machine and its first serial port."""

    qemu: QemuProcess
    serial: Serial

    @property
    def run_state(self) -> str:
        """QEMU's word for what it does."""
        return str(self.qemu.execute("query-status")["status"])

    def status(self) -> str:
        """The state of its migration."""
        return str(self.qemu.query_migrate().get("status"))


class Arrival:
    """A ``vmferry.receive`` that runs in the background; ``progress`` is what it last reported."""

    def __init__(self, uri: str, directory: Path, **options: Any) -> None:
        started: queue.SimpleQueue[Destination] = queue.SimpleQueue()
        self.directory = directory
        self.progress = vmferry.Progress("setup")
        self._result = background(
            lambda: vmferry.receive(
                uri, directory, started=started.put, progress=self._report, **options
            )
        )
        self.destination = started.get(timeout=PATIENCE)
        self.address = self.destination.address

    def _report(self, progress: vmferry.Progress) -> None:
        self.progress = progress

    def result(self) -> vmferry.Checkpoint:
        """The checkpoint, once everything has come."""
        return self._result.result(PATIENCE)


class Lab:
    """Starts machines, and moves them; a context manager, as the fixture ``lab``."""

    def __init__(self, start_qemu: Callable[..., QemuProcess], path: Path) -> None:
        self.path = path
        self._start_qemu = start_qemu
        self._machines = 0
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def directory(self) -> Path:
        """A new one for a machine's files."""
        self._machines += 1
        path = self.path / f"machine{self._machines}"
        path.mkdir()
        return path

    def source(self, scenario: Scenario = PC, *more: str) -> Vm:
        """A machine whose guest runs and has stamped every page."""
        qemu = self._start_qemu(
            *scenario.arguments(self.directory()), *more, target=scenario.target
        )
        keep_on_one_processor(qemu)
        vm = Vm(qemu, Serial(qemu.serial))
        if scenario.target == "x86_64" and scenario.start != "none":
            vm.serial.wait_beat()
        if scenario.before:
            scenario.before(qemu)
        return vm

    def destination(
        self, scenario: Scenario = PC, *, blank_disks: bool = False, pass_fds: Sequence[int] = ()
    ) -> Vm:
        """A machine of the same kind that waits for ``migrate-incoming``."""
        directory = self.directory()
        arguments = scenario.arguments(directory)
        if blank_disks:
            for disk in directory.glob("disk*"):
                disk.write_bytes(bytes(disk.stat().st_size))
        qemu = self._start_qemu(
            *arguments, "-incoming", "defer", target=scenario.target, pass_fds=pass_fds
        )
        return Vm(qemu, Serial(qemu.serial))

    def arrival(self, uri: str | None = None, **options: Any) -> Arrival:
        """Begin to receive, into a new directory."""
        place = self.directory()
        arrival = Arrival(uri or f"unix:{place}/socket", place / "checkpoint", **options)
        self._cleanup.callback(arrival.destination.cancel)
        return arrival

    def depart(self, vm: Vm, scenario: Scenario, uri: str) -> None:
        """Begin to migrate, held back until the scenario has had its rounds."""
        vm.qemu.migrate(
            uri,
            capabilities=scenario.capabilities,
            parameters={
                "downtime-limit": 1,
                "max-bandwidth": scenario.bandwidth,
                **dict(scenario.parameters),
            },
        )

    def complete(self, vm: Vm, scenario: Scenario, arrival: Arrival) -> vmferry.Checkpoint:
        """Let a migration end; the source is ``completed`` then, and the memory saved right."""
        try:
            finish_migration(vm.qemu, scenario)
        except PeerError:
            arrival.result()  # if it failed, it knows why
            raise
        return self.saved(arrival.result(), scenario)

    def saved(self, checkpoint: vmferry.Checkpoint, scenario: Scenario) -> vmferry.Checkpoint:
        """*checkpoint*, if the guest's memory is right in it; open as long as the test runs."""
        self._cleanup.enter_context(checkpoint)
        memory = main_memory(checkpoint, scenario)
        if memory is not None and scenario.target == "x86_64" and scenario.start != "none":
            assert check_ram(memory.path.read_bytes(), **dict(scenario.guest)) == []
        return checkpoint

    def receive(
        self, vm: Vm, scenario: Scenario = PC, uri: str | None = None, **options: Any
    ) -> vmferry.Checkpoint:
        """Save a running machine, over a UNIX socket unless *uri* says another."""
        arrival = self.arrival(uri, **options)
        self.depart(vm, scenario, arrival.address)
        return self.complete(vm, scenario, arrival)

    def resume(
        self,
        checkpoint: vmferry.Checkpoint,
        scenario: Scenario = PC,
        options: vmferry.SendOptions | None = None,
        *,
        capabilities: Sequence[str] = (),
        parameters: dict[str, object] | None = None,
        blank_disks: bool = False,
    ) -> Vm:
        """A fresh QEMU that was sent the machine over a UNIX socket, and runs it."""
        vm = self.destination(scenario, blank_disks=blank_disks)
        uri = f"unix:{self.directory()}/socket"
        vm.qemu.incoming(uri, capabilities=capabilities, parameters=parameters)
        vmferry.send(checkpoint, uri, options=options)
        vm.qemu.wait_migration()
        return vm

    def assert_goes_on(self, vm: Vm, source: Vm, scenario: Scenario = PC) -> None:
        """The guest counts on from where the stopped *source* was, and misses nothing."""
        self.assert_counts(vm, source.serial.drain(), scenario)

    def assert_counts(self, vm: Vm, after: int, scenario: Scenario = PC) -> None:
        """The guest counts on from *after*, with all its memory, and does not start anew."""
        vm.qemu.wait_running()
        assert vm.serial.wait_beat() > after
        # One more, and it has looked at every page since it was resumed.
        vm.serial.wait_beat()
        assert "R" not in vm.serial.lines
        vm.qemu.execute("stop")
        memory = vm.qemu.directory / "memory"
        vm.qemu.save_memory(memory, 0, scenario.ram_size)
        assert check_ram(memory.read_bytes(), **dict(scenario.guest)) == []


def monitored(lab: Lab, scenario: Scenario = PC) -> tuple[Vm, str]:
    """A QEMU that waits, and the path of another monitor of it."""
    monitor = f"{lab.directory()}/qmp"
    more = ("-chardev", f"socket,id=more,path={monitor},server=on,wait=off")
    machine = (*scenario.machine, *more, "-mon", "chardev=more,mode=control")
    return lab.destination(replace(scenario, machine=machine)), monitor


def main_memory(checkpoint: vmferry.Checkpoint, scenario: Scenario) -> StoredPages | None:
    """The machine's memory in a checkpoint, ``None`` where the source shares it."""
    block = next(block for block in checkpoint.blocks if block.length == scenario.ram_size)
    return checkpoint.memory(block)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as *condition* holds; fail if it never does."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.005)
