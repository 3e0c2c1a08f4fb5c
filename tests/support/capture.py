"""Real migration streams: a walker runs in a real QEMU and is migrated while it writes memory."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from guests import Serial, walker
from tests.support.recorder import Channel, Recorder
from vmferry.qemu import QemuProcess

DISK_SIZE = 1 << 20

_HELD: dict[str, object] = {"downtime-limit": 1, "max-bandwidth": 32 << 20}
_RELEASED: dict[str, object] = {"downtime-limit": 10_000, "max-bandwidth": 1 << 40}
_POLL = 0.002  # seconds


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A machine, its guest, and how it is migrated.

    machine:      arguments for QEMU, without memory, guest and disks.
    memory:       MiB.
    guest:        parameters of :func:`guests.walker`.
    boot:         start the guest by ``-kernel``, or from disk 0.
    disks:        ``-drive`` options, each for a raw image of 1 MiB of its own, without ``file=``;
                  the guest stands at the start of the first one, a pattern in the rest.
    capabilities, parameters: of the migration, on both sides.
    rounds:       passes over RAM that the source is held to before it may finish.
    destination:  migrate to a second QEMU through a recorder, instead of to a silent recorder.
    postcopy:     switch to postcopy after the rounds.
    before:       called with the source before it migrates.
    """

    machine: tuple[str, ...] = ("-machine", "pc", "-nodefaults")
    memory: int = 16
    guest: tuple[tuple[str, int], ...] = (("pages", 512),)
    boot: bool = False
    disks: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    parameters: tuple[tuple[str, object], ...] = ()
    rounds: int = 2
    destination: bool = False
    postcopy: bool = False
    before: Callable[[QemuProcess], None] | None = None

    def image(self) -> bytes:
        """The guest's boot sector, which is its multiboot kernel too."""
        return walker(**dict(self.guest))

    def arguments(self, directory: Path) -> list[str]:
        """QEMU's arguments; writes the guest and the disks to *directory*."""
        arguments = [*self.machine, "-m", str(self.memory)]
        image = self.image()
        if not self.boot:
            (directory / "guest").write_bytes(image)
            arguments += ["-kernel", str(directory / "guest")]
        for number, options in enumerate(self.disks):
            disk = directory / f"disk{number}"
            disk.write_bytes(disk_content(number, image))
            arguments += ["-drive", f"{options},format=raw,file={disk}"]
        return arguments


def disk_content(number: int, image: bytes) -> bytes:
    """What disk *number* of a scenario holds at first: 1 MiB, a quarter of it not zero."""
    pattern = bytes((number * 7 + i) % 251 for i in range(251)) * (DISK_SIZE // 4 // 251)
    return (image + pattern).ljust(DISK_SIZE, b"\0")


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """A finished migration whose source is still there, stopped, for questions."""

    source: QemuProcess
    destination: QemuProcess | None
    serial: Serial
    channels: list[Channel]


@contextmanager
def migrated(scenario: Scenario) -> Iterator[Migrated]:
    """Run and migrate *scenario*."""
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-capture-"))
        )
        arguments = scenario.arguments(directory)
        source = stack.enter_context(QemuProcess(arguments))
        target = directory / "target" if scenario.destination else None
        destination = None
        if target:
            (directory / "copies").mkdir()
            copied = scenario.arguments(directory / "copies")
            destination = stack.enter_context(QemuProcess([*copied, "-incoming", "defer"]))
            destination.incoming(
                f"unix:{target}",
                capabilities=scenario.capabilities,
                parameters=dict(scenario.parameters),
            )
        recorder = stack.enter_context(Recorder(directory / "recorder", target))
        serial = Serial(source.serial)
        serial.wait_ready()
        serial.wait_beat()
        if scenario.before:
            scenario.before(source)
        source.migrate(
            f"unix:{directory / 'recorder'}",
            capabilities=scenario.capabilities,
            parameters=_HELD | dict(scenario.parameters),
        )
        _finish(source, scenario)
        if destination:
            destination.wait_migration()
        recorder.join()
        yield Migrated(
            source=source, destination=destination, serial=serial, channels=recorder.channels
        )


@functools.cache
def capture(scenario: Scenario) -> tuple[Channel, ...]:
    """The bytes of each channel of *scenario*, the main one first; made once in a test run."""
    with migrated(scenario) as done:
        return tuple(done.channels)


def _finish(source: QemuProcess, scenario: Scenario) -> None:
    """Hold the source for the rounds, then let it go."""
    while (state := source.query_migrate()).get("status") in {"setup", "active"}:
        if state.get("ram", {}).get("dirty-sync-count", 0) > scenario.rounds:
            break
        time.sleep(_POLL)
    if scenario.postcopy:
        source.execute("migrate-start-postcopy")
    source.prepare_migration(parameters=_RELEASED)
    source.wait_migration()
