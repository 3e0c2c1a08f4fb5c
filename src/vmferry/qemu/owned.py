"""A move between two QEMUs whose machine has a record of its owner.

A QEMU knows nothing of records, so whoever leads the move keeps to them for both.  The destination
is kept from starting by itself, and from taking the images (capability ``late-block-activate``); it
loads everything, and when the source says that it is done (``postmigrate``), the record is changed
first and the destination is told to run second.  A source that goes on by itself, because a word
was lost, is still the owner then, and what the destination has loaded is of no use to anybody.

A QEMU opens its images and runs by one and the same command.  So the record says that it is started
before that, and what the source still has counts as out of date from then on: only who was told by
the destination itself that it did not run may give the machine back.

Nothing here has to outlive the one who leads: record and QEMUs say how far it was, and
:meth:`OwnedMove.settle` goes on from there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from vmferry.errors import InDoubt, PeerError, StorageError, TransportError, UsageError, printable
from vmferry.faults import reach
from vmferry.ownership.engine import nominee, taken_by_another
from vmferry.ownership.file_store import FileStore
from vmferry.ownership.identity import Identity
from vmferry.ownership.names import name_of, new_token
from vmferry.ownership.protocol import Act, Party, Swap, Verdict, judge
from vmferry.ownership.record import Phase, Record
from vmferry.ownership.store import Outcome, StoreSilent, open_store

from .qmp import Qmp, QmpError

CAPABILITIES: Final = {"return-path": True, "late-block-activate": True}
"""What both sides need for it."""

_TAG: Final = "vmferry-owner-"
_POLL: Final = 0.1
_END: Final = 10.0
"""Seconds that a QEMU may take to end."""

_FINISHED: Final = "postmigrate"
_BUSY: Final = frozenset({"setup", "active", "device", "cancelling", "wait-unplug"})
_SILENCE: Final = "nothing is known of the machine until it answers"


class Side:
    """A QEMU behind a monitor, and what the record calls it; *what* is for people.

    It gets its name once, and keeps it as long as it lives: an object that is made in it says so.
    One that cannot be reached has *qmp* ``None``, and the name that the record has for it.  Raises
    :class:`UsageError` where it is no QEMU.
    """

    def __init__(self, qmp: Qmp | None, what: str) -> None:
        self.qmp = qmp
        self.what = what
        self.party = Party("" if qmp is None else _name(qmp, what))

    @property
    def name(self) -> str:
        """Its name in the record."""
        return self.party.name

    def state(self) -> tuple[str, str] | None:
        """Its run state and that of its migration; ``None`` where it does not answer."""
        if self.qmp is None:
            return None
        try:
            run = self.qmp.execute("query-status")
            migration = self.qmp.execute("query-migrate")
        except TransportError:
            return None
        return str(run.get("status")), str(migration.get("status", "none"))

    def run(self) -> None:
        """Let it run, unless it does."""
        if (state := self.state()) is not None and state[0] != "running":
            self.tell("cont")

    def tell(self, command: str) -> None:
        """Have it carry out *command*, if it can be reached."""
        if self.qmp is not None:
            self.qmp.execute(command)


class OwnedMove:
    """A move of the machine of *store*'s record, from *source* to *destination*.

    Whoever leads one has :meth:`~vmferry.ownership.file_store.FileStore.lead`: what is told a QEMU
    was decided by what the record said a moment before, and nobody may have changed it since.

    To settle one, either may be ``None``, for a QEMU that cannot be reached.  *note* is told, for
    people, what is waited for.  :meth:`cancel` ends a wait for the store.
    """

    def __init__(
        self,
        store: FileStore,
        source: Qmp | None,
        destination: Qmp | None,
        *,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        self._note = note
        self._unwanted = False
        self._here = Side(source, "source")
        self._there = Side(destination, "destination")
        self._runs = True

    def cancel(self) -> bool:
        """Wait for the store no longer, from any thread."""
        self._unwanted = True
        return True

    def begin(self, source: Qmp) -> None:
        """See that the machine is the source's.

        Raises :class:`UsageError` where it is another engine's.
        """
        vm = _machine(source)
        record = self._store.read().record or Record(vm=vm)
        if record.vm != vm:
            raise UsageError(
                f"{self._store.uri}: expected the record of {printable(vm)}, found that of"
                f" {printable(record.vm)}"
            )
        if self._do(Act.CLAIM, self._here, new=record) is Verdict.WAIT:
            raise UsageError(taken_by_another(self._store, record))
        token = nominee(new_token())
        generation = self._read().generation
        self._here.party = replace(self._here.party, token=token, floor=generation)
        self._there.party = replace(self._there.party, token=token)
        self._runs = bool(source.execute("query-status")["running"])

    def offer(self) -> None:
        """The source has stopped the machine: name who is to have it."""
        if self._do(Act.OFFER, self._here) is not Verdict.DONE:
            raise PeerError(f"{self._store.uri}: the machine could not be offered: it was changed")

    def settle(self) -> bool:
        """Give the machine to who is to have it, and let it run there; whether that is there.

        Also for a move that was broken off at any point.  Raises :class:`InDoubt` where that cannot
        be known: then it runs nowhere, and nothing is lost.
        """
        while True:
            record = self._read()
            self._recognise(record)
            match record.phase:
                case Phase.HELD if record.owner == self._here.name:
                    self._goes_on_here()
                    return False
                case Phase.HELD if record.owner == self._there.name:
                    self._goes_on_there()
                    return True
                case Phase.TAKEN if record.owner == self._there.name:
                    self._start_there()
                case Phase.OFFERED | Phase.GRANTED if record.owner == self._here.name:
                    self._decide(record)
                case _:
                    raise PeerError(taken_by_another(self._store, record))

    # Whose it is

    def _recognise(self, record: Record) -> None:
        """Who cannot be reached is whom the record names beside the other one."""
        here, there = self._here, self._there
        if not here.name and record.owner != there.name:
            here.party = replace(here.party, name=record.owner)
        elif not here.name and record.phase is Phase.TAKEN:
            here.party = replace(here.party, name=record.nominee)
        is_there = record.phase in {Phase.TAKEN, Phase.HELD} and record.owner != here.name
        if not there.name and is_there:
            there.party = replace(there.party, name=record.owner)

    def _decide(self, record: Record) -> None:
        """It was offered: give it away, or take it back."""
        self._there.party = replace(self._there.party, token=record.nominee)
        self._here.party = replace(self._here.party, token=record.nominee)
        if not self._is_there():
            self._do(Act.REVOKE, self._here)
            return
        if self._here.state() is not None:
            self._do(Act.GRANT, self._here)
        if self._do(Act.TAKE, self._there) is Verdict.WAIT:
            raise InDoubt(self._fence(self._here))

    def _is_there(self) -> bool:
        """Whether the destination has loaded it all, and the source has nothing more to do."""
        here, there = self._ended_here(), self._there.state()
        is_loaded = there is not None and there[1] == "completed"
        if here is not None:
            return here == _FINISHED and is_loaded
        if is_loaded:
            return True  # the record says whether the source is known to be gone
        raise PeerError(
            f"{self._store.uri}: the source does not answer, and the destination has not loaded the"
            " machine. If the source has ended, vmferry owner release, and start it once more, as"
            " after a power cut"
        )

    def _ended_here(self) -> str | None:
        """The source's run state once it migrates no more; ``None`` where it does not answer."""
        while (state := self._here.state()) is not None:
            run, migration = state
            if migration == "pre-switchover":  # nobody is left who would let it go on
                self._here.tell("migrate_cancel")
            elif run != "finish-migrate" and migration not in _BUSY:
                return run
            time.sleep(_POLL)
        return None

    def _start_there(self) -> None:
        """The record says that it is the destination's, and that it has not run there yet."""
        if self._there.state() is None:
            if self._do(Act.REVOKE, self._here) is not Verdict.DONE:
                raise InDoubt(self._fence(self._there))
            return
        self._do(Act.START, self._there)
        try:
            self._goes_on_there()
        except QmpError as error:
            self._give_back(error)

    def _goes_on_there(self) -> None:
        if self._there.state() is None:
            raise PeerError(
                f"{self._store.uri}: the machine is the destination's, which does not answer: where"
                " it has ended, start it once more, as after a power cut"
            )
        if self._runs:
            self._there.run()

    def _give_back(self, error: QmpError) -> None:
        """The destination has said that it did not run: let it end, and have the machine back."""
        self._note(f"the destination cannot have the machine: {error.description}")
        with suppress(TransportError, QmpError):
            self._there.tell("quit")
        deadline = time.monotonic() + _END
        while self._do(Act.CLAIM, self._here) is Verdict.WAIT:
            if time.monotonic() > deadline:
                raise InDoubt(f"{error}; {self._fence(self._there)}") from error
            time.sleep(_POLL)

    def _goes_on_here(self) -> None:
        """It is the source's: what the destination has is out of date."""
        with suppress(TransportError, QmpError):
            if (there := self._there.state()) is not None and there[1] == "completed":
                self._there.tell("quit")
        here = self._ended_here()
        if here is None:
            raise PeerError(
                f"{self._store.uri}: the machine is the source's, which does not answer: start it"
                " there once more"
            )
        if here == _FINISHED and self._runs:
            self._here.run()

    def _fence(self, side: Side) -> str:
        generation = self._read().generation
        return (
            f"{self._store.uri}: the {side.what} does not answer, and is not known to be gone: the"
            " machine stands still. When it is certain that it cannot run there: vmferry owner"
            f" fence {self._store.uri} --engine {side.name} --generation {generation}"
            " --i-have-fenced-it, and the same command with --settle"
        )

    # The record

    def _read(self) -> Record:
        while True:
            try:
                record = self._store.read().record
            except StoreSilent as error:
                self._wait(error)
                continue
            if record is None:
                raise StorageError(f"{self._store.uri}: there is no record")
            return record

    def _do(self, act: Act, side: Side, *, new: Record | None = None) -> Verdict:
        """Have the record say so, however long the store is silent."""
        while True:
            try:
                seen = self._store.read()
                record = seen.record or new
                if record is None:
                    raise StorageError(f"{self._store.uri}: there is no record")
                found = judge(act, record, side.party)
                if not isinstance(found, Swap):
                    return found
                reach(f"{act}-asked")
                match self._store.swap(seen, found):
                    case Outcome.LANDED:
                        reach(f"{act}-landed")
                        return Verdict.DONE
                    case Outcome.NOT_GONE:
                        return Verdict.WAIT
                    case Outcome.UNKNOWN:
                        self._wait(StoreSilent(f"{self._store.uri}: gave no answer to {act}"))
                    case Outcome.LOST:
                        pass
            except StoreSilent as error:
                self._wait(error)

    def _wait(self, error: StoreSilent) -> None:
        if self._unwanted:
            raise InDoubt(f"{error}; {_SILENCE}: the same command with --settle goes on")
        self._note(f"in doubt: {error}; {_SILENCE}")
        time.sleep(_POLL)


def record_for_qemus(uri: str) -> FileStore:
    """The store at *uri*; raises :class:`UsageError` where it is none for a QEMU."""
    store = open_store(uri)
    if not isinstance(store, FileStore):
        raise UsageError(
            f"{store.uri}: a QEMU renews no lease, so that it would count as gone while it runs:"
            " let the record be in a file"
        )
    return store


def _machine(qmp: Qmp) -> str:
    """What the record calls the machine: its UUID, or else its name."""
    uuid = str(qmp.execute("query-uuid").get("UUID", ""))
    if uuid.strip("0-"):
        return uuid
    return str(qmp.execute("query-name").get("name", "")) or "vm"


def _name(qmp: Qmp, what: str) -> str:
    """The name of a QEMU: with its process where that is known, so that it can be seen to be dead.

    The other end of a monitor may be a tunnel, which is no QEMU.
    """
    try:
        listed = qmp.execute("qom-list", {"path": "/objects"})
        tags = [str(entry["name"]) for entry in listed if str(entry["name"]).startswith(_TAG)]
        tag = tags[0].removeprefix(_TAG) if tags else secrets.token_hex(4)
        if not tags:
            made = {"qom-type": "secret", "id": f"{_TAG}{tag}", "data": "-"}
            qmp.execute("object-add", made)
    except QmpError as error:
        raise UsageError(
            f"the {what} is no QEMU whose record could be kept from here ({error.description}); a"
            " machine of vmferry keeps its own"
        ) from error
    process = _process(qmp)
    return f"qemu-{tag}" if process is None else name_of(process, tag)


def _process(qmp: Qmp) -> Identity | None:
    pid = qmp.peer_pid
    if pid is None:
        return None
    try:
        process = Identity.of(pid)
        program = Path(f"/proc/{pid}/exe").readlink()
    except OSError:
        return None
    return process if program.name.startswith("qemu") else None
