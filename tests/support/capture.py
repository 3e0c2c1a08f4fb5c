"""Real migration streams: a walker runs in a real QEMU and is migrated while it writes memory."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from guests import Serial, firmware, walker
from tests.support.recorder import Channel, Recorder
from vmferry.qemu import QemuProcess

DISK_SIZE = 2 << 20

_PPC_IDLE = bytes.fromhex("48000000") * 1024  # b .
# The bandwidth stays: with more of it the source would go through many more rounds until it takes
# its next look at the limits.  The last round has no limit anyway.
_RELEASED: dict[str, object] = {"downtime-limit": 2_000_000}
_POLL = 0.002  # seconds


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A machine, its guest, and how it is migrated.

    machine:      arguments for QEMU, without memory, guest and disks; ``{ram}`` becomes the number
                  of bytes of memory.
    memory:       MiB; an x86 machine has 8 KiB more, see :attr:`ram_size`.
    guest:        parameters of :func:`guests.walker`.
    start:        how the guest starts: by ``-kernel``, from disk 0, as the firmware, which leaves
                  little in memory beside the guest, or not at all: then the machine does what it
                  would do anyway.
    target:       the architecture; only x86_64 has a guest, "firmware" on ppc waits for ever.
    disks:        ``-drive`` options, without ``file=``; each gets a raw image of its own, with the
                  content of :func:`disk_content`.
    capabilities, parameters: of the migration, on both sides.
    rounds:       passes over RAM that the source is held to before it may finish.
    bandwidth:    bytes a second while it is held.  QEMU looks ten times a second how far it is, and
                  until then finishes with whatever it has sent: a tenth of this has to be less than
                  the memory in use, or there is one round only.
    destination:  migrate to a second QEMU through a recorder, instead of to a silent recorder.
    postcopy:     switch to postcopy after the rounds.
    before:       called with the source before it migrates.
    """

    machine: tuple[str, ...] = ("-machine", "pc", "-nodefaults")
    memory: int = 16
    guest: tuple[tuple[str, int], ...] = (("pages", 512),)
    start: Literal["kernel", "disk", "firmware", "none"] = "kernel"
    target: str = "x86_64"
    disks: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    parameters: tuple[tuple[str, object], ...] = ()
    rounds: int = 2
    bandwidth: int = 16 << 20
    destination: bool = False
    postcopy: bool = False
    before: Callable[[QemuProcess], None] | None = None

    def image(self) -> bytes:
        """The guest's boot sector, which is its multiboot kernel too."""
        return walker(**dict(self.guest))

    @property
    def ram_size(self) -> int:
        """Bytes of memory.

        Never a multiple of 64 pages on x86: in such a block QEMU 7.2 forgets, under TCG, to watch a
        page again once it was found dirty, so that a migration of more than one round loses writes,
        and the guest rightly complains at the other end.
        """
        return (self.memory << 20) + (8 << 10 if self.target == "x86_64" else 0)

    def arguments(self, directory: Path) -> list[str]:
        """QEMU's arguments; writes the guest and the disks to *directory*."""
        arguments = [part.replace("{ram}", str(self.ram_size)) for part in self.machine]
        arguments += ["-m", f"{self.ram_size >> 10}k"]
        image, program = self.image(), directory / "guest"
        if self.start == "firmware":
            program.write_bytes(_PPC_IDLE if self.target != "x86_64" else firmware(image))
            arguments += ["-bios", str(program)]
        elif self.start == "kernel":
            program.write_bytes(image)
            arguments += ["-kernel", str(program)]
        for number, options in enumerate(self.disks):
            disk = directory / f"disk{number}"
            disk.write_bytes(disk_content(number, image))
            arguments += ["-drive", f"{options},format=raw,file={disk}"]
        return arguments


def disk_content(number: int, image: bytes) -> bytes:
    """What disk *number* of a scenario holds at first: the guest, a pattern, a MiB of zeros."""
    pattern = bytes((number * 7 + i) % 251 for i in range(251)) * 1000
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
        source = stack.enter_context(QemuProcess(arguments, target=scenario.target))
        keep_on_one_processor(source)
        target = directory / "target" if scenario.destination else None
        destination = None
        if target:
            (directory / "copies").mkdir()
            copied = scenario.arguments(directory / "copies")
            destination = stack.enter_context(
                QemuProcess([*copied, "-incoming", "defer"], target=scenario.target)
            )
            destination.incoming(
                f"unix:{target}",
                capabilities=scenario.capabilities,
                parameters=dict(scenario.parameters),
            )
        recorder = stack.enter_context(Recorder(directory / "recorder", target))
        serial = Serial(source.serial)
        if scenario.target == "x86_64" and scenario.start != "none":
            serial.wait_beat()
        if scenario.before:
            scenario.before(source)
        source.migrate(
            f"unix:{directory / 'recorder'}",
            capabilities=scenario.capabilities,
            parameters={
                "downtime-limit": 1,
                "max-bandwidth": scenario.bandwidth,
                **dict(scenario.parameters),
            },
        )
        finish_migration(source, scenario)
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


def keep_on_one_processor(source: QemuProcess) -> None:
    """Let all threads of *source* run on one processor, those that a migration starts too.

    Under TCG, QEMU 7.2 loses a write now and then: a guest that has just found its page to be dirty
    stops watching it, while the migration takes note of the page and starts to.  From then on that
    page is stale, at a destination of QEMU's own too: in 5 of 212 migrations of a mac99 on a busy
    machine, and in none of 431 on one processor, where the two threads hardly ever meet.
    """
    processor = random.choice(sorted(os.sched_getaffinity(0)))  # noqa: S311 - nothing secret
    for task in Path(f"/proc/{source.pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a helper of QEMU that has just ended
            os.sched_setaffinity(int(task.name), {processor})


def finish_migration(source: QemuProcess, scenario: Scenario) -> None:
    """Hold a source that migrates for the rounds, then let it go and wait for its end."""
    while _held(source) and _rounds(source) <= scenario.rounds:
        time.sleep(_POLL)
    if scenario.postcopy:
        source.execute("migrate-start-postcopy")
        while _held(source):
            time.sleep(_POLL)
    source.prepare_migration(parameters=_RELEASED)
    source.wait_migration()


def _held(source: QemuProcess) -> bool:
    return source.query_migrate().get("status") in {"setup", "active"}


def _rounds(source: QemuProcess) -> int:
    return int(source.query_migrate().get("ram", {}).get("dirty-sync-count", 0))
