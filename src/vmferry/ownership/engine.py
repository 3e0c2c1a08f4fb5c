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
from .protocol import (
    LOOKS,
    MOVES,
    WANTS,
    WRITES,
    Act,
    Party,
    Stage,
    Swap,
    Verdict,
    Word,
    judge,
    look,
)
from .record import Phase, Record
from .store import Outcome, Seen, Store, StoreSilent

_ASK: Final = 0.1
"""Seconds between two looks at the record."""

_RENEW, _STOP, _KILL = 0.25, 0.6, 0.85
"""Shares of the term: how often to renew, when to stop the machine for want of that, and when the
kernel ends a process that has not."""

_GUARD: Final = 0.02
"""Share of the term between two looks at whether to stop."""


def nominee(token: int) -> str:
    """How the record names whoever a migration with this token goes to."""
    return f"migration-{token:016x}"


class Ownership:
    """One engine and the record at *store*, for the machine *vm* with its *images*.

    *pause* stops the machine, lets go of its images, and says whether it ran; it is called wherever
    the images may not be open any more, whatever was done before.  *resume* lets it run again.
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
        self._acting = threading.RLock()
        self._keeping = threading.Lock()
        self._stage = Stage.CLAIMING
        self._doubt = ""
        self._valid = now() if store.term else math.inf
        self._owes = False
        self._reached: set[str] = set()
        self._closing = threading.Event()
        self._deadman = DeadMan() if store.term else None
        self._threads = [
            threading.Thread(target=work, name="ownership", daemon=True)
            for work in (self._renewing, self._guarding)
        ]

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
        self._move(Stage.CLAIMING, Word.DONE)
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

    def carry_out(self, act: Callable[[], None], *, runs: bool = False) -> bool:
        """Do *act*, which opens the images or lets the machine run; false where that may not be.

        The lease does not lapse in between: where that takes too long, and the store is silent, the
        kernel ends this process.  Where it has lapsed, and with *act* the machine *runs*, it runs
        when the lease counts again.
        """
        with self._acting:
            self._check_lease()
            if self._stage in {Stage.OPENING, Stage.RUNNING}:
                act()
                return True
            self._owes |= runs and self._stage is Stage.LAPSED
            return False

    def stand_still(self) -> None:
        """The machine does not run again by itself."""
        with self._acting:
            self._owes = False

    # Giving it away

    def stop(self) -> bool:
        """The machine stops for the switchover; false where it may not run here as it is."""
        with self._acting:
            self._check_lease()
            if self._owes:
                return False
            return self._move(Stage.RUNNING, Word.STOP)

    def prepare(self) -> int:
        """A token for a migration that begins."""
        token = new_token()
        self.party = Party(self.party.name, nominee(token), self.party.floor)
        return token

    def offer(self, given_up: Callable[[], bool]) -> None:
        """Name the nominee, now that the images are let go of.

        Raises where the record is not this engine's, or *given_up*.
        """
        floor = self._await_read(given_up).generation
        self.party = Party(self.party.name, self.party.token, floor)
        if not self._move(Stage.STOPPED, Word.OFFER):
            raise StorageError(f"{self.store.uri}: was silent for so long that the lease lapsed")
        self._settle(given_up)
        if self._stage is not Stage.OFFERED:
            raise PeerError(f"{self.store.uri}: the machine could not be offered: it was changed")

    def grant(self, given_up: Callable[[], bool]) -> None:
        """Let the nominee take the machine."""
        self._move(Stage.OFFERED, Word.READY)
        self._settle(given_up)
        if self._stage is not Stage.GRANTED:
            raise PeerError(f"{self.store.uri}: the machine could not be granted: it was changed")

    def given(self) -> None:
        """The nominee has said that it runs the machine."""
        self._move(Stage.GRANTED, Word.GIVEN)

    def undo(self) -> bool:
        """The migration is off: whether the machine may run here again.

        Waits for an answer of the store; in doubt until then.
        """
        self._undo()
        while self._stage is Stage.REVOKING:
            if self._settle(lambda: False) is Verdict.WAIT:
                self._note_doubt("the destination has taken the machine, and not started it yet")
                self._rest()
        self._look()
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
        self._move(Stage.LOADING, Word.READY)

    def try_take(self) -> bool:
        """Take the machine if it was granted; false where it was not yet.

        Raises :class:`PeerError` where its owner has it back.
        """
        self._settle(lambda: False)
        self._look()
        if self._stage in {Stage.OPENING, Stage.RETURNING}:
            return True
        if self._stage is Stage.GONE:
            raise PeerError("the source has taken its machine back")
        return False

    def start(self) -> bool:
        """The images are in place: whether the machine may run here from now on."""
        self._check_lease()
        self._move(Stage.OPENING, Word.START)
        return self._conclude()

    def decline(self) -> bool:
        """Give back what was not started; whether the machine is this engine's nonetheless."""
        self._undo()
        return self._conclude()

    def _conclude(self) -> bool:
        while self._stage in {Stage.STARTING, Stage.RETURNING}:
            self._settle(lambda: False)
        self._look()
        return self.may_run

    def _undo(self) -> None:
        with self._lock:
            if Word.UNDO in MOVES[self._stage]:
                self._move(self._stage, Word.UNDO)

    def _look(self) -> None:
        """Return when it is known what the record says, if that is to be looked at now."""
        while self._stage in LOOKS and not self._regain():
            self._rest()

    # The end

    def close(self) -> None:
        """Stop the machine, let go of its images, and release it if the store answers.

        In doubt nothing is released, nor where the images cannot be let go of: the record says what
        it says.
        """
        self.stand_still()
        try:
            if self._stage in WRITES:
                self._pause()
        finally:
            self._closing.set()
            for thread in self._threads:
                if thread.is_alive():
                    thread.join()
            if self._deadman is not None:
                self._deadman.close()
        with suppress(StorageError):
            if self._stage in {Stage.RUNNING, Stage.LOOKING, Stage.LAPSED}:
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
        stage = self._stage
        act = WANTS[stage]
        while self._stage is stage:
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
            self._move(stage, Word(found))
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

    def _move(self, stage: Stage, word: Word) -> bool:
        """Go on from *stage*; false where the lease has lapsed there meanwhile."""
        with self._lock:
            if self._stage is not stage:
                return False
            to = MOVES[stage][word]
            if to in WRITES and not self._is_valid():
                to = MOVES[to][Word.LAPSE]
            if stage in WRITES and to not in WRITES:
                # Before the timer of the kernel is disarmed.
                self._owes |= self._pause() and to is Stage.LAPSED
            self._stage = to
            self._arm()
            return True

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
        if stage not in LOOKS:
            return True
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
        self._move(stage, Word(found))
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

    # Two threads

    def _begin_guarding(self) -> None:
        for thread in self._threads:
            thread.start()

    def _renewing(self) -> None:
        """Keep the lease, and have back what has lapsed; waits for the store, and nothing else."""
        term = self.store.term
        pace = _ASK if term is None else term * _RENEW / 4
        renewed = now()
        while not self._closing.wait(pace):
            if self._stage is Stage.LAPSED:
                with suppress(StorageError):
                    self._regain()
            if term is None or self._stage is Stage.GONE or now() - renewed < term * _RENEW:
                continue
            with suppress(StorageError), self._keeping:
                if self._keep(None if self._stage is Stage.LOADING else self.store.read()):
                    renewed = now()

    def _guarding(self) -> None:
        """Stop before the lease ends, and go on when it counts again; waits for no store."""
        while self.store.term is not None and not self._closing.wait(self.store.term * _GUARD):
            with suppress(StorageError):  # while its images cannot be let go of the timer is armed
                self._check_lease()
            with suppress(StorageError):
                self._run_again()

    def _check_lease(self) -> None:
        """If the lease may end soon: stop, and be known to have stopped before it does."""
        with self._acting, self._lock:
            if self._stage not in WRITES or self._is_valid():
                return
            self._move(self._stage, Word.LAPSE)
        self._note_doubt("the lease could not be renewed: the machine stands still until it can")

    def _run_again(self) -> None:
        with self._acting:
            if self._owes and self._stage is Stage.RUNNING:
                self._owes = False
                self._resume()


def taken_by_another(store: Store, record: Record) -> str:
    """What to tell somebody who wants a machine that another engine has."""
    return (
        f"{store.uri}: the machine is {record.phase} by {record.owner}, generation"
        f" {record.generation}. If that engine cannot run it any more, make sure of that and say"
        f" so: vmferry owner fence {store.uri} --engine {record.owner} --generation"
        f" {record.generation} --i-have-fenced-it"
    )
