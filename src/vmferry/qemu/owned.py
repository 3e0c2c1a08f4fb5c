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
_MOVE: Final = "vmferry-move-"
_RUNS: Final = "-runs"
_POLL: Final = 0.1
_END: Final = 10.0
"""Seconds that a QEMU may take to end."""

_FINISHED: Final = "postmigrate"
_EARLY: Final = frozenset({"setup", "wait-unplug", "active", "pre-switchover"})
_BUSY: Final = _EARLY | {"device", "cancelling"}
_SILENCE: Final = "nothing is known of the machine until it answers"


class Side:
    """A QEMU behind a monitor, and what the record calls it; *what* is for people.

    It is marked by objects that are made in it, and keeps them as long as it lives: one has its tag
    for good, another says which move it takes part in, as long as it is to run at the end of it.
    One that cannot be reached has *qmp* ``None``, and the name that the record has for it.  Raises
    :class:`UsageError` where it is no QEMU.
    """

    def __init__(self, qmp: Qmp | None, what: str) -> None:
        self.qmp = qmp
        self.what = what
        self.tag = "" if qmp is None else _tag(qmp, what)
        self.party = Party("" if qmp is None else _name(qmp, self.tag))

    @property
    def name(self) -> str:
        """Its name in the record."""
        return self.party.name

    def is_named(self, name: str) -> bool:
        """Whether that is its name, whichever way it was reached when it got that."""
        return bool(name) and bool(self.tag) and name.endswith(self.tag)

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

    def mark(self, move: str, *, runs: bool) -> None:
        """It takes part in *move*, and no other; *runs*: the machine ran before."""
        self.unmark()
        if self.qmp is not None:
            _make(self.qmp, f"{_MOVE}{_plain(move)}{_RUNS if runs else ''}")

    def unmark(self) -> None:
        """It takes part in no move any more."""
        if self.qmp is not None:
            for name in _objects(self.qmp, _MOVE):
                self.qmp.execute("object-del", {"id": name})

    def takes_part(self, move: str = "") -> bool:
        """Whether it was marked for that move, or for any."""
        marks: list[str] = []
        with suppress(TransportError):
            marks = [] if self.qmp is None else _objects(self.qmp, _MOVE)
        if not move:
            return bool(marks)
        return f"{_MOVE}{_plain(move)}" in {name.removesuffix(_RUNS) for name in marks}

    def run(self) -> None:
        """Let it run where it is to, once; it may stand still for other reasons afterwards."""
        if self.qmp is None:
            return
        if any(name.endswith(_RUNS) for name in _objects(self.qmp, _MOVE)):
            if self.qmp.execute("query-status")["status"] != "running":
                self.qmp.execute("cont")
            self.unmark()

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

    def cancel(self) -> bool:
        """Wait for the store no longer, from any thread."""
        self._unwanted = True
        return True

    def begin(self, source: Qmp) -> None:
        """See that the machine is the source's.

        Raises :class:`UsageError` where it is another engine's, or was given away.
        """
        status = source.execute("query-status")
        if status["status"] == _FINISHED:
            raise UsageError(
                "the source has given its machine away (postmigrate), and what it still has may be"
                " out of date: --settle says where the machine is"
            )
        vm = _machine(source)
        record = self._store.read().record or Record(vm=vm)
        self._check_vm(record)
        self._recognise(record)
        if self._do(Act.CLAIM, self._here, new=record) is not Verdict.DONE:
            raise UsageError(taken_by_another(self._store, record))
        token = nominee(new_token())
        generation = self._read().generation
        self._here.party = replace(self._here.party, token=token, floor=generation)
        self._there.party = replace(self._there.party, token=token)
        for side in (self._here, self._there):
            side.mark(token, runs=bool(status["running"]))

    def offer(self) -> None:
        """The source has stopped the machine: name who is to have it."""
        self._demand(Act.OFFER, self._here)

    def settle(self) -> bool:
        """Give the machine to who is to have it, and let it run there; whether that is there.

        Also for a move that was broken off at any point.  Raises :class:`InDoubt` where that cannot
        be known: then it runs nowhere, and nothing is lost.
        """
        while True:
            record = self._read()
            self._check_vm(record)
            self._recognise(record)
            is_given = record.phase in {Phase.OFFERED, Phase.GRANTED}
            if record.owner in record.fenced and not is_given:
                raise PeerError(
                    f"{self._store.uri}: the owner is fenced: vmferry owner release, and start the"
                    " machine once more, as after a power cut"
                )
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

    def _check_vm(self, record: Record) -> None:
        """Both sides have to be of the machine that the record is about."""
        for side in (self._here, self._there):
            vm = record.vm
            with suppress(TransportError):  # whoever needs it will see
                vm = record.vm if side.qmp is None else _machine(side.qmp)
            if record.vm != vm:
                raise UsageError(
                    f"{self._store.uri}: expected the record of {printable(vm)}, which is the"
                    f" {side.what}'s machine, found that of {printable(record.vm)}"
                )

    def _recognise(self, record: Record) -> None:
        """Who cannot be reached is whom the record names beside the other one."""
        here, there = self._here, self._there
        for side in (here, there):
            for name in (record.owner, record.nominee):
                if side.is_named(name):  # as somebody else may have reached it
                    side.party = replace(side.party, name=name)
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
        here, there = self._ended_here(), self._there.state()
        is_loaded = (
            there is not None and there[1] == "completed" and self._there.takes_part(record.nominee)
        )
        if here is None and not is_loaded:
            raise PeerError(
                f"{self._store.uri}: the source does not answer, and the destination has not loaded"
                " the machine. If the source has ended, vmferry owner release, and start it once"
                " more, as after a power cut"
            )
        if here is not None:
            # What was seen of it decides, and is not asked for again: it may be another by then.
            if here != (_FINISHED, "completed") or not is_loaded:
                self._demand(Act.REVOKE, self._here)
                return
            self._demand(Act.GRANT, self._here)
        if self._do(Act.TAKE, self._there) is Verdict.WAIT:
            raise InDoubt(self._fence(self._here))

    def _demand(self, act: Act, side: Side) -> None:
        if self._do(act, side) is not Verdict.DONE:
            raise PeerError(
                f"{self._store.uri}: the record was changed by somebody else: vmferry owner history"
            )

    def _ended_here(self) -> tuple[str, str] | None:
        """The source's states once it migrates no more; ``None`` where it does not answer."""
        while (state := self._here.state()) is not None:
            run, migration = state
            if run != "finish-migrate" and migration not in _BUSY:
                return state
            # Nobody is left who would let it go on, or it waits for somebody who says nothing.
            if migration in _EARLY or self._there.state() is None:
                with suppress(QmpError):
                    self._here.tell("migrate_cancel")
            if self._unwanted:
                raise InDoubt(f"the source is still {run}: the same command goes on")
            time.sleep(_POLL)
        return None

    def _start_there(self) -> None:
        """The record says that it is the destination's, and that it has not run there yet."""
        if self._there.state() is None:
            if self._do(Act.REVOKE, self._here) is not Verdict.DONE:
                raise InDoubt(self._fence(self._there))
            return
        self._demand(Act.START, self._there)
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
            there = self._there.state()
            if there == ("paused", "completed") and self._there.takes_part():
                self._there.tell("quit")
        here = self._ended_here()
        if here is None:
            raise PeerError(
                f"{self._store.uri}: the machine is the source's, which does not answer: start it"
                " there once more"
            )
        if here[0] == _FINISHED:
            self._here.run()
        else:
            self._here.unmark()

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


def _tag(qmp: Qmp, what: str) -> str:
    """What tells a QEMU from all others."""
    try:
        tags = _objects(qmp, _TAG)
        if not tags:
            tags = [f"{_TAG}{secrets.token_hex(4)}"]
            _make(qmp, tags[0])
    except QmpError as error:
        raise UsageError(
            f"the {what} is no QEMU whose record could be kept from here ({error.description}); a"
            " machine of vmferry keeps its own"
        ) from error
    return tags[0].removeprefix(_TAG)


def _objects(qmp: Qmp, prefix: str) -> list[str]:
    listed = qmp.execute("qom-list", {"path": "/objects"})
    return [str(entry["name"]) for entry in listed if str(entry["name"]).startswith(prefix)]


def _make(qmp: Qmp, name: str) -> None:
    """An object of QEMU's that does nothing, and goes with its process."""
    qmp.execute("object-add", {"qom-type": "secret", "id": name, "data": "-"})


def _plain(move: str) -> str:
    return "".join(letter for letter in move if letter.isalnum())


def _name(qmp: Qmp, tag: str) -> str:
    """The name of a QEMU: with its process where that is known, so that it can be seen to be dead.

    The other end of a monitor may be a tunnel, which is no QEMU.
    """
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
    return process if program.name.startswith("qemu-system") else None
