"""A machine with a record and a journal on its disk, that begins to move to another process."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from tests.migration.runs_of_vmferry import LONG, Process, afterwards, config, goes_on, once_around
from tests.transports.support import wait_until
from vmferry import TransportError
from vmferry.machines.config import MachineConfig, OwnershipConfig, to_toml
from vmferry.ownership.record import Phase
from vmferry.ownership.store import open_store

SHORT = {"x-vmferry-answer-deadline": 2.0, "x-vmferry-idle-deadline": 2.0}


class Pair:
    """Its record is at *uri*, its disk in *path*, where each side has a name of its own for it."""

    def __init__(self, stack: ExitStack, path: Path, uri: str) -> None:
        self._stack, self._path = stack, path
        self.store = open_store(uri)
        machine = replace(config(path), ownership=OwnershipConfig(store=uri))
        self.disk = Path(machine.disk[0].file)
        self.name_there = path / "there.raw"
        self.name_there.symlink_to(self.disk)
        there = replace(machine, disk=(replace(machine.disk[0], file=str(self.name_there)),))
        self._here, self._there = self._written("here", machine), self._written("there", there)

    def _written(self, name: str, machine: MachineConfig) -> Path:
        file = self._path / f"{name}.toml"
        file.write_text(to_toml(machine))
        return file

    def begin(
        self,
        *,
        source: str = "",
        destination: str = "",
        pauses: bool = False,
        fails: bool = False,
        waits_at: str = "",
        to: str = "",
    ) -> tuple[Process, Process]:
        """Both sides; with *fails* the destination does not get at the disk in the end.

        It waits at *waits_at*, and *to* is where the source thinks that it is.
        """
        start, path = self._stack.enter_context, self._path
        channel = waits_at or f"unix:{path}/channel"
        here = start(Process(self._here, path / "here", fault=source))
        there = start(
            Process(self._there, path / "there", "--incoming", "defer", fault=destination)
        )
        there.qmp.execute("migrate-set-parameters", SHORT)
        there.qmp.execute("migrate-incoming", {"uri": channel})
        wait_until(lambda: any(self.disk.read_bytes()[:512]), LONG)
        state = {"capability": "pause-before-switchover", "state": pauses}
        here.qmp.execute("migrate-set-capabilities", {"capabilities": [state]})
        here.qmp.execute("migrate-set-parameters", SHORT)
        if fails:
            self.name_there.unlink()
        with suppress(TransportError):  # it may die before it has answered
            here.qmp.execute("migrate", {"uri": to or channel})
        return here, there

    def arrive(self, name: str) -> Process:
        """One more destination, that waits at the channel of its *name*."""
        arriving = ("--incoming", f"unix:{self._path}/{name}.channel")
        return self._stack.enter_context(Process(self._here, self._path / name, *arriving))

    @property
    def phase(self) -> Phase:
        record = self.store.read().record
        assert record is not None
        return record.phase

    def goes_on(self) -> None:
        """Somebody writes the journal, and nobody else does."""
        goes_on(self._path)

    def starts_anew(self) -> Process:
        """The one command for what has crashed, or has lost its lease."""
        record = self.store.read().record
        assert record is not None
        wait_until(lambda: self.store.gone(record.owner), LONG)
        assert afterwards(self._path) >= 0
        before = self.disk.read_bytes()
        again = self._stack.enter_context(Process(self._here, self._path / "again"))
        assert the_one_that_runs(again) is again
        once_around(self._path, before)
        return again


def runs(one: Process) -> bool:
    """Whether the machine runs there."""
    with suppress(TransportError):  # it has ended
        return one.run_state == "running"
    return False


def the_one_that_runs(*processes: Process) -> Process:
    """Wait until there is one; it fails if there are two."""

    def running() -> list[Process]:
        return [one for one in processes if runs(one)]

    wait_until(lambda: bool(running()), LONG)
    (one,) = running()
    return one
