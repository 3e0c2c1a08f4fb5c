"""A running machine moves from process to process, and is proved to be intact behind it.

::

    proof = demonstrate(moves=2)
    print(proof.downtimes, proof.heartbeats)

Nothing is staged: the processes are those of ``vmferry run``, driven by QMP as by ``vmferry
migrate``.  The guest keeps checking its own memory; behind the last move all of it is compared,
byte by byte, with what it has to be.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from vmferry.errors import MachineError, UsageError
from vmferry.machines import DiskConfig, GuestConfig, MachineConfig, usable_kind
from vmferry.machines.config import PAGE
from vmferry.machines.guest.console import Console, Heartbeat
from vmferry.machines.guest.journal import SECTOR, read_journal
from vmferry.machines.guest.layout import Layout
from vmferry.qemu.driver import Migration
from vmferry.qemu.hosting import DEFER
from vmferry.qemu.info import MigrationInfo
from vmferry.qemu.machine_process import MachineProcess
from vmferry.qemu.postcopy import CAPABILITY, AfterRounds

RAM: Final = 256 << 20

_DISK: Final = 1 << 20

_RATE: Final = 8192
"""Pages that the guest rewrites in a second: 32 MiB."""
_BANDWIDTH: Final = 96 << 20
"""Bytes per second, at least: little enough for a migration that can be watched."""
_SHARE: Final = 4
"""By what the background of a postcopy is slower: it shall be seen what is asked for."""
_LOOK: Final = 0.05
_PATIENCE: Final = 60.0
_AFTERWARDS: Final = 1.0
"""Seconds of guest time behind a move, at most, in which the guest goes over all of its pages."""

_PARAMETERS: Final = {
    "downtime-limit": 7,
    # The limit of max-bandwidth does not count in the switchover.
    "avail-switchover-bandwidth": 1 << 30,
    # A machine that has much else to do may need more.
    "x-vmferry-stall-policy": "raise-downtime",
    "x-vmferry-stall-seconds": 0.5,
    "x-vmferry-downtime-step": 20,
}


@dataclass(frozen=True, slots=True)
class Side:
    """A process: its ``pid``, what its machine does, and the heartbeats that came from there."""

    pid: int
    state: str
    heartbeats: int
    last: Heartbeat | None


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment of move ``number`` of ``moves``; ``rounds`` has the bytes to send in each so far."""

    number: int
    moves: int
    migration: MigrationInfo
    rounds: tuple[int, ...]
    sides: tuple[Side, Side]


@dataclass(frozen=True, slots=True)
class Moved:
    """A move from process ``source`` to process ``destination`` that has completed.

    ``stood_still`` is how long guest time did, in seconds, by the guest's own two clocks.
    """

    number: int
    source: int
    destination: int
    migration: MigrationInfo
    stood_still: float


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found when it was over; what is wrong would have been raised instead.

    ``heartbeats`` of one guest, without a break; ``checked`` pages that it found as it had left
    them; ``pages`` of memory seen from outside, each as it must be; ``downtimes`` in seconds.
    ``records`` of its journal on the disk, as far as they were not written over; ``None`` without.
    """

    heartbeats: int
    checked: int
    pages: int
    downtimes: tuple[float, ...]
    records: int | None = None


Told = Callable[[MachineConfig | Moved], None]
Seen = Callable[[Moment], None]


def demonstrate(
    *,
    ram: int = RAM,
    moves: int = 2,
    kind: str = "auto",
    disk: bool = False,
    postcopy: bool = False,
    told: Told = lambda _: None,
    seen: Seen = lambda _: None,
) -> Proof:
    """Move a machine with *ram* bytes of memory *moves* times, and prove that it is intact.

    *kind* is ``kvm``, ``unicorn`` or ``auto``.  With a *disk*, which all the processes share, the
    guest keeps a journal on it.  With *postcopy* it goes before its memory, which it asks for while
    it runs.  *told* is called with the machine at first and with
    each move behind it; *seen* about every 50 ms with how it goes.  Raises
    :class:`~vmferry.errors.MachineError` where no machine can be run here, with what to install,
    and for whatever is wrong.
    """
    if moves < 1:
        raise UsageError(f"expected one move or more, found {moves}")
    with tempfile.TemporaryDirectory(prefix="vmferry-demo-") as directory:
        image = Path(directory) / "disk.raw"
        config = _config(ram, usable_kind() if kind == "auto" else kind, image if disk else None)
        told(config)
        with _Demonstration(config, moves, directory, postcopy, seen) as demonstration:
            downtimes = [moved.stood_still for moved in demonstration.run(told)]
            proof = demonstration.prove(tuple(downtimes))
        return replace(proof, records=_records(image, proof.heartbeats)) if disk else proof


def _records(image: Path, heartbeats: int) -> int:
    """How many records of the journal are there, all of them right."""
    found = read_journal(image.read_bytes())
    if found.faults:
        raise MachineError(f"the journal on the disk is wrong: {found.faults[0]}")
    # The first heartbeat of a guest has none, and that of the last may not have been written.
    if not heartbeats - 3 <= found.last + 1 <= heartbeats:
        raise MachineError(
            f"the journal ends with record {found.last}, behind {heartbeats} heartbeats"
        )
    return min(found.last + 1, image.stat().st_size // SECTOR)


def _config(ram: int, kind: str, image: Path | None) -> MachineConfig:
    working_set = max(ram // 4 // PAGE * PAGE, PAGE)
    guest = GuestConfig(working_set=working_set, rate=_RATE, hot=0.5, changed=0.5, heartbeat=0.05)
    disks: tuple[DiskConfig, ...] = ()
    if image is not None:
        with image.open("wb") as file:
            file.truncate(_DISK)
        disks = (DiskConfig(file=str(image)),)
    return MachineConfig(kind=kind, ram=ram, guest=guest, disk=disks)


@dataclass(slots=True)
class _Demonstration:
    """The processes, and what they have said; all but the latest two are gone."""

    config: MachineConfig
    moves: int
    directory: str
    postcopy: bool
    seen: Seen
    cleanup: ExitStack = field(default_factory=ExitStack)
    processes: list[MachineProcess] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)

    def __enter__(self) -> _Demonstration:
        self._begin("runs")
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup.close()

    def run(self, told: Told) -> Iterator[Moved]:
        """One move after the other."""
        self._begin("waits for it")
        self._wait(1, lambda: self._has(0, lambda last: last.filled))
        for number in range(1, self.moves + 1):
            moved = self._move(number)
            told(moved)
            yield moved
            if number < self.moves:
                self._begin("waits for it")
            self.processes[number - 1].check()
            self.processes[number - 1].quit()

    def prove(self, downtimes: tuple[float, ...]) -> Proof:
        """Look at everything, or raise what is wrong."""
        last = self.processes[-1]
        last.qmp.execute("stop")
        last.check()
        last.quit()
        beats = unbroken(b"".join(bytes(process.said) for process in self.processes))
        layout = Layout.of(self.config)
        # The first walk over each page fills it; from then on it is checked.
        checked = max(beats[-1].hot - layout.hot, 0)
        checked += max(beats[-1].cold - (layout.pages - layout.hot), 0)
        return Proof(len(beats), checked, self.config.ram // PAGE, downtimes)

    def _begin(self, state: str) -> None:
        number = len(self.processes)
        incoming = DEFER if number else None
        process = MachineProcess(self.config, incoming=incoming, timeout=_PATIENCE)
        self.processes.append(self.cleanup.enter_context(process))
        self.states.append(state)

    def _move(self, number: int) -> Moved:
        source, destination = self.processes[number - 1 : number + 1]
        uri = f"unix:{self.directory}/{number}"
        if self.postcopy:
            on = [{"capability": CAPABILITY, "state": True}]
            destination.qmp.execute("migrate-set-capabilities", {"capabilities": on})
        destination.qmp.execute("migrate-incoming", {"uri": uri})
        self.rounds.clear()
        before = source.console.wait_beat(_PATIENCE)
        migration = Migration(source.qmp)
        bandwidth = max(_BANDWIDTH, Layout.of(self.config).pages * PAGE)
        bounds = {"max-bandwidth": bandwidth, "max-postcopy-bandwidth": bandwidth // _SHARE}
        migration.begin(
            uri,
            parameters=_PARAMETERS | bounds,
            postcopy=AfterRounds() if self.postcopy else None,
        )
        self.states[number - 1] = "is being moved"
        info = migration.wait(lambda now: self._look(number, now))
        self.states[number - 1 : number + 1] = "has moved away", "runs"
        # The first heartbeat may tell of the time before the move.
        self._wait(number, lambda: destination.console.count >= 2, info)
        stood_still = destination.console.beats[-1].stood_still(before) / 1e9
        self._go_on(number, info)
        return Moved(number, source.pid, destination.pid, info, stood_still)

    def _look(self, number: int, now: MigrationInfo) -> None:
        if now.is_postcopy:
            self.states[number - 1 : number + 1] = "serves its memory", "runs without all of it"
        self._show(number, now)

    def _go_on(self, number: int, info: MigrationInfo) -> None:
        """Let the guest check what has come."""
        arrived = self.processes[number].console.beats[-1]
        pages = Layout.of(self.config).pages
        self._wait(
            number,
            lambda: self._has(
                number,
                lambda now: (
                    now.hot + now.cold >= arrived.hot + arrived.cold + pages
                    or now.time >= arrived.time + _AFTERWARDS * 1e9
                ),
            ),
            info,
        )

    def _has(self, index: int, met: Callable[[Heartbeat], bool]) -> bool:
        beats = self.processes[index].console.beats
        return bool(beats) and met(beats[-1])

    def _wait(
        self, number: int, met: Callable[[], bool], info: MigrationInfo | None = None
    ) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not met():
            for process in self.processes[number - 1 : number + 1]:
                process.console.check()
            if time.monotonic() > deadline:
                raise MachineError(f"the guest is silent, or too slow for {_PATIENCE:g} s")
            self._show(number, info or MigrationInfo())
            time.sleep(_LOOK)

    def _show(self, number: int, info: MigrationInfo) -> None:
        if info.is_under_way and info.remaining and info.round > len(self.rounds):
            self.rounds.append(info.remaining)
        here, there = (self._side(index) for index in (number - 1, number))
        self.seen(Moment(number, self.moves, info, tuple(self.rounds), (here, there)))

    def _side(self, index: int) -> Side:
        process = self.processes[index]
        beats = process.console.beats
        return Side(
            process.pid, self.states[index], process.console.count, beats[-1] if beats else None
        )


def unbroken(said: bytes) -> list[Heartbeat]:
    """The heartbeats of a guest, from all that it said, wherever it was meanwhile.

    Raises :class:`MachineError` where a line is not whole, or goes back behind the one before it.
    """
    beats: list[Heartbeat] = []
    for number, line in enumerate(said.split(b"\n")[:-1], 1):
        console = Console()
        console.feed(line + b"\n")
        console.check()
        if not console.beats:
            raise MachineError(f"line {number} of the guest is not whole: {line[:80]!r}")
        now = console.beats[-1]
        if beats and not _follows(now, beats[-1]):
            raise MachineError(f"heartbeat {number} goes back: {now}, behind {beats[-1]}")
        beats.append(now)
    return beats


def _follows(now: Heartbeat, before: Heartbeat) -> bool:
    goes_on = now.hot >= before.hot and now.cold >= before.cold and now.filled >= before.filled
    return now.time > before.time and goes_on
