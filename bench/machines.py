"""The guests of the benchmarks, in a QEMU that sends them or waits for them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Sample
from bench.processes import cpu_of
from guests import Serial, walker
from vmferry.errors import TransportError
from vmferry.qemu import QemuProcess

_TIMEOUT = 120.0
_NO_LIMIT = 1 << 40
_CAPABILITIES = ("return-path", "multifd")


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest with *memory* in MiB.

    With *preallocated* all of its memory is taken before anything is measured.

    It fills *fill* pages with words that do not compress, and puts a stamp on *pages* of them.
    """

    name: str
    memory: int
    pages: int
    fill: int = 0
    preallocated: bool = False

    def arguments(self, directory: Path) -> list[str]:
        """QEMU's arguments; writes the guest's program to *directory*."""
        program = directory / f"{self.name}.img"
        program.write_bytes(walker(pages=self.pages, fill=self.fill))
        # 8 KiB more, for the dirty log of QEMU 7.2 under TCG loses writes where the memory is a
        # multiple of 64 pages.
        size = f"{self.memory * 1024 + 8}k"
        machine = ["-machine", "pc,accel=tcg", "-nodefaults", "-m", size, "-kernel", str(program)]
        if not self.preallocated:
            return machine
        backend = f"memory-backend-ram,id=ram,size={size},prealloc=on"
        return [*machine, "-object", backend, "-machine", "memory-backend=ram"]


FULL = Guest("full", 1088, pages=16, fill=1 << 18)
EMPTY = Guest("empty", 4096, pages=4096)
QUICK = (
    Guest("full", 80, pages=16, fill=1 << 14),
    Guest("empty", 256, pages=256),
)


class Source:
    """A QEMU whose guest is paused, to be migrated any number of times."""

    def __init__(self, qemu: QemuProcess) -> None:
        self._qemu = qemu

    def cpu(self) -> float:
        """Seconds of CPU that it has taken."""
        return cpu_of(self._qemu.pid)

    def migrate(
        self,
        uri: str,
        *,
        capabilities: Sequence[str] = (),
        channels: int = 2,
        running: bool = False,
    ) -> Sample:
        """Migrate: ``seconds`` as QEMU counts them, ``bytes``, and when it ``started`` for us.

        With *running* the guest runs meanwhile, and there is a ``downtime``.
        """
        qemu = self._qemu
        if running:
            qemu.execute("cont")
        wanted = [{"capability": c, "state": c in capabilities} for c in _CAPABILITIES]
        qemu.execute("migrate-set-capabilities", {"capabilities": wanted})
        limits = {"max-bandwidth": _NO_LIMIT, "multifd-channels": channels}
        qemu.execute("migrate-set-parameters", limits)
        started = time.perf_counter()
        qemu.execute("migrate", {"uri": uri})
        try:
            answer = qemu.wait_migration(timeout=_TIMEOUT)
            while not answer["total-time"]:  # said to be completed a little before it is counted
                answer = qemu.wait_migration(timeout=_TIMEOUT)
        except TransportError:
            qemu.execute("migrate_cancel")
            raise
        # Only a machine that has run since can be migrated again.
        qemu.execute("cont")
        qemu.execute("stop")
        seconds = answer["total-time"] / 1e3
        sample = {"seconds": seconds, "bytes": answer["ram"]["transferred"], "started": started}
        return {**sample, "downtime": answer["downtime"] / 1e3}


@contextmanager
def source(guest: Guest, directory: Path) -> Iterator[Source]:
    """Run the guest until it has written its memory, and pause it."""
    with QemuProcess(guest.arguments(directory)) as qemu:
        Serial(qemu.serial).wait_ready(_TIMEOUT)
        qemu.execute("stop")
        yield Source(qemu)


@contextmanager
def destination(
    guest: Guest,
    directory: Path,
    uri: str,
    capabilities: Sequence[str] = (),
    channels: int = 2,
) -> Iterator[QemuProcess]:
    """A QEMU that waits at *uri*."""
    with QemuProcess([*guest.arguments(directory), "-incoming", "defer"]) as qemu:
        if channels != 2:
            qemu.execute("migrate-set-parameters", {"multifd-channels": channels})
        qemu.incoming(uri, capabilities=capabilities)
        yield qemu


def loaded(qemu: QemuProcess) -> float:
    """Wait until a destination has loaded the machine; when that was, on our clock."""
    qemu.wait_migration(timeout=_TIMEOUT)
    return time.perf_counter()
