"""An engine's part in the ownership of one machine: it carries out what :mod:`.protocol` says."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vmferry.errors import ChannelClosed, PeerError, StorageError, UsageError
from vmferry.faults import reach

from .deadman import DeadMan, now
from .names import new_name, new_token
from .protocol import MOVES, WANTS, WRITES, Act, Party, Stage, Swap, Verdict, Word, judge, look
from .record import Phase, Record
from .store import Outcome, Seen, Store, StoreSilent

_ASK: Final = 0.1
"""Seconds between two looks at the record."""

_RENEW, _STOP, _KILL = 0.25, 0.6, 0.85
"""Shares of the term: how often to renew, when to stop the machine for want of that, and when the
kernel ends a process that has not."""


def nominee(token: int) -> str:
    """How the record names whoever a migration with this token goes to."""
    return f"migration-{token:016x}"


class Ownership:
    """One engine and the record at *store*, for the machine *vm* with its *images*.

    *pause* stops the machine where its lease is in danger and says whether it ran, *resume* lets it
    run again.
    *doubt* is told why nothing can be known for the moment, and an empty text when it is known
    again.  Methods that change the record return when it has changed, however long the store is
    silent; a thread of its own renews the lease.
    """

    def __init__(
        self,
        store: Store,
        *,
        vm: str,
        images: str = "",
        pause: Callable[[], bool],
        resume: Callable[[], None],
        doubt: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.store = store
        self._vm, self._images = vm, images
        self._pause, self._resume, self._tell_doubt = pause, resume, doubt
        self.party = Party(new_name())
        self._lock = threading.RLock()
        self._keeping = threading.Lock()
        self._stage = Stage.CLAIMING
        self._doubt = ""
        self._valid = now() if store.term else math.inf
        self._was_running = False
        self._lapsed = False
        self._reached: set[str] = set()
        self._closing = threading.Event()
        self._deadman = DeadMan() if store.term else None
        self._guard = threading.Thread(target=self._guarding, name="ownership", daemon=True)

    @property
    def stage(self) -> Stage:
        """What this engine may do with the machine."""
        return self._stage

    @property
    def may_run(self) -> bool:
        """Whether the machine may run here."""
        return self._stage is Stage.RUNNING

    @property
    def doubt(self) -> str:
        """Why it cannot be known who has the machine; empty where it can."""
        return self._doubt

    # A machine that starts here

    def claim(self) -> None:
        """Become the owner of a machine that nobody has.

        Raises :class:`UsageError` where another engine has it, and is not known to be gone; and
        :class:`StorageError` where the store says nothing.
        """
        self._stage = Stage.CLAIMING
        seen = self.store.read()
        while True:
            record = seen.record or Record(vm=self._vm, images=self._images)
            self._check_same(record)
            found = judge(Act.CLAIM, record, self.party)
            if not isinstance(found, Swap):
                break
            reach("claim-asked")
            outcome = self.store.swap(seen, found)
            if outcome is Outcome.LANDED:
                break
            if outcome is Outcome.NOT_GONE:
                raise UsageError(taken_by_another(self.store, record))
            seen = self.store.read()
        self._move(Word.DONE)
        reach("claim-landed")
        if not self._regain():
            raise StorageError(f"{self.store.uri}: the lease was not given")
        self._begin_guarding()

    def await_machine(self) -> None:
        """Wait for a machine that is migrated to here."""
        self._stage = Stage.LOADING
        with suppress(StorageError):
            self._keep(None)
        self._begin_guarding()

    # Giving it away

    def stop(self) -> bool:
        """The machine was stopped for the switchover; false where this engine does not own it."""
        with self._lock:
            if self._stage is not Stage.RUNNING:
                return False
            self._move(Word.STOP)
            return True

    def prepare(self) -> int:
        """A token for a migration that begins."""
        token = new_token()
        self.party = Party(self.party.name, nominee(token), self.party.floor)
        return token

    def offer(self, given_up: Callable[[], bool]) -> None:
        """Name the nominee; raises where the record is not this engine's, or *given_up*."""
        floor = self._await_read(given_up).generation
        self.party = Party(self.party.name, self.party.token, floor)
        self._move(Word.OFFER)
        self._settle(given_up)
        if self._stage is not Stage.OFFERED:
            raise PeerError(f"{self.store.uri}: the machine could not be offered: it was changed")

    def grant(self, given_up: Callable[[], bool]) -> None:
        """Let the nominee take the machine."""
        self._move(Word.READY)
        self._settle(given_up)
        if self._stage is not Stage.GRANTED:
            raise PeerError(f"{self.store.uri}: the machine could not be granted: it was changed")

    def given(self) -> None:
        """The nominee has said that it runs the machine."""
        self._move(Word.GIVEN)

    def undo(self) -> bool:
        """The migration is off: whether the machine may run here again.

        Waits for an answer of the store; in doubt until then.
        """
        with self._lock:
            if Word.UNDO in MOVES[self._stage]:
                self._move(Word.UNDO)
        while self._stage is Stage.REVOKING:
            if self._settle(lambda: False) is Verdict.WAIT:
                self._note_doubt("the destination has taken the machine, and not started it yet")
                self._rest()
        while self._stage is Stage.LAPSED and not self._regain():
            self._rest()
        self._note_doubt("")
        return self.may_run

    # Taking it

    def expect(self, token: int, patience: float | None) -> None:
        """Check that the record offers the machine to whoever was told *token*.

        Raises :class:`PeerError` where it does not: the two sides mean different records.
        """
        self.party = Party(self.party.name, nominee(token))
        deadline = now() + (math.inf if patience is None else patience)
        record = self._await_read(lambda: now() > deadline)
        if record.nominee != self.party.token or record.phase is not Phase.OFFERED:
            raise PeerError(
                f"{self.store.uri}: this record does not offer the machine to here: do both sides"
                f" name the same one? It is {record.phase} by {record.owner or 'nobody'}"
            )
        self._check_same(record)
        self._move(Word.READY)

    def try_take(self) -> bool:
        """Take the machine if it was granted; false where it was not yet.

        Raises :class:`PeerError` where its owner has it back.
        """
        self._settle(lambda: False)
        while self._stage is Stage.TAKEN and not self._regain():
            self._rest()
        if self._stage in {Stage.OPENING, Stage.RETURNING}:
            return True
        if self._stage is Stage.GONE:
            raise PeerError("the source has taken its machine back")
        return False

    def start(self) -> bool:
        """The images are in place: whether the machine may run here from now on."""
        with self._lock:
            if self._stage is Stage.OPENING:
                self._move(Word.START)
        return self._conclude()

    def decline(self) -> bool:
        """Give back what was not started; whether the machine is this engine's nonetheless."""
        with self._lock:
            if Word.UNDO in MOVES[self._stage]:
                self._move(Word.UNDO)
        return self._conclude()

    def _conclude(self) -> bool:
        while self._stage in {Stage.STARTING, Stage.RETURNING}:
            self._settle(lambda: False)
        while self._stage is Stage.LAPSED and not self._regain():
            self._rest()
        return self.may_run

    # The end

    def close(self) -> None:
        """Release what this engine owns, if the store answers; the machine does not run any more.

        In doubt nothing is released: the record says what it says.
        """
        self._closing.set()
        if self._guard.is_alive():
            self._guard.join()
        if self._deadman is not None:
            self._deadman.close()
        with suppress(StorageError):
            if self._stage in {Stage.RUNNING, Stage.LAPSED}:
                seen = self.store.read()
                if seen.record is not None:
                    found = judge(Act.RELEASE, seen.record, self.party)
                    if isinstance(found, Swap):
                        self.store.swap(seen, found)
            self._stage = Stage.GONE
            self.store.leave(self.party.name)

    # What is common

    def _settle(self, given_up: Callable[[], bool]) -> Verdict | None:
        """Have what this stage wants; WAIT where somebody else has to do something first."""
        act = WANTS[self._stage]
        while True:
            if given_up():
                raise ChannelClosed("the migration was cancelled on this side")
            try:
                seen = self.store.read()
            except StoreSilent as error:
                self._in_doubt(error)
                continue
            record = seen.record
            found = Verdict.NEVER if record is None else judge(act, record, self.party)
            if isinstance(found, Swap):
                if not found.gone:  # else it is a question, asked again and again
                    self._reach(f"{act}-asked")
                match self.store.swap(seen, found):
                    case Outcome.LANDED:
                        found = Verdict.DONE
                        self._reach(f"{act}-landed")
                    case Outcome.NOT_GONE:
                        found = Verdict.WAIT
                    case Outcome.LOST:
                        continue
                    case Outcome.UNKNOWN:
                        self._in_doubt(StoreSilent(f"{self.store.uri}: gave no answer to {act}"))
                        continue
            if found is Verdict.WAIT:
                return found
            self._note_doubt("")
            self._move(Word(found))
            return None

    def _reach(self, point: str) -> None:
        """A fault point; a change that is tried again reaches it once."""
        if point not in self._reached:
            self._reached.add(point)
            reach(point)

    def _await_read(self, given_up: Callable[[], bool]) -> Record:
        while True:
            try:
                record = self.store.read().record
            except StoreSilent as error:
                self._in_doubt(error)
            else:
                self._note_doubt("")
                if record is None:
                    raise PeerError(f"{self.store.uri}: there is no record")
                return record
            if given_up():
                raise StoreSilent(f"{self.store.uri}: says nothing")

    def _move(self, word: Word) -> None:
        with self._lock:
            to = MOVES[self._stage][word]
            if to in WRITES and not self._is_valid():
                to = MOVES[to][Word.LAPSE]
            self._stage = to
            self._arm()

    def _is_valid(self) -> bool:
        return self.store.term is None or now() < self._valid - (1 - _STOP) * self.store.term

    def _arm(self) -> None:
        if self._deadman is not None and self.store.term is not None:
            last = self._valid - (1 - _KILL) * self.store.term
            self._deadman.arm(last if self._stage in WRITES else None)

    def _keep(self, seen: Seen | None) -> bool:
        began = now()
        if not self.store.keep(self.party.name, seen):
            return False
        with self._lock:
            self._valid = began + (self.store.term or math.inf)
            self._arm()
        return True

    def _regain(self) -> bool:
        """In a stage of LOOKS: whether it is known now what the record says, and it was heeded."""
        stage = self._stage
        try:
            with self._keeping:  # the lease is not given anew between the two
                seen = self.store.read()
                found = Verdict.NEVER
                if seen.record is not None:
                    found = look(stage, seen.record, self.party)
                if found is Verdict.WAIT or (found is Verdict.DONE and not self._keep(seen)):
                    return False
        except StoreSilent as error:
            self._note_doubt(str(error))
            return False
        self._note_doubt("")
        self._move(Word(found))
        return self._stage is not stage

    def _in_doubt(self, error: Exception) -> None:
        self._note_doubt(str(error))
        self._rest()

    def _rest(self) -> None:
        if self._closing.wait(_ASK):
            raise ChannelClosed("the engine ends, in doubt about who has the machine")

    def _note_doubt(self, why: str) -> None:
        if bool(why) != bool(self._doubt):
            self._doubt = why
            self._tell_doubt(why)

    def _check_same(self, record: Record) -> None:
        if record.vm != self._vm:
            raise UsageError(
                f"{self.store.uri}: expected the record of {self._vm}, found that of {record.vm}"
            )

    # The guard

    def _begin_guarding(self) -> None:
        self._guard.start()

    def _guarding(self) -> None:
        pace = _ASK if self.store.term is None else self.store.term * _RENEW / 4
        renewed = now()
        while not self._closing.wait(pace):
            if self._stage is Stage.LAPSED and self._lapsed:
                self._come_back()
                continue
            if self.store.term is None or self._stage is Stage.GONE:
                continue
            if now() - renewed >= self.store.term * _RENEW:
                with suppress(StorageError), self._keeping:
                    if self._keep(None if self._stage is Stage.LOADING else self.store.read()):
                        renewed = now()
            if self._stage in WRITES and not self._is_valid():
                self._lapse()

    def _lapse(self) -> None:
        """The lease may end soon: stop, and be known to have stopped before it does."""
        with self._lock:
            if self._stage is not Stage.RUNNING:
                return  # the kernel's timer is for whoever is about to start
            self._was_running = self._pause()
            self._lapsed = True
            self._move(Word.LAPSE)
        self._note_doubt("the lease could not be renewed: the machine stands still until it can")

    def _come_back(self) -> None:
        with suppress(StorageError):
            if self._regain():
                self._lapsed = False
                if self.may_run and self._was_running:
                    self._resume()


def taken_by_another(store: Store, record: Record) -> str:
    """What to tell somebody who wants a machine that another engine has."""
    return (
        f"{store.uri}: the machine is {record.phase} by {record.owner}, generation"
        f" {record.generation}. If that engine cannot run it any more, make sure of that and say"
        f" so: vmferry owner fence {store.uri} --engine {record.owner} --generation"
        f" {record.generation} --i-have-fenced-it"
    )
