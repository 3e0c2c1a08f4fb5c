"""Never two that run the machine: a walk over all that two sides and their messages can be."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest

from tests.migration.races import at_once
from vmferry.migration import status
from vmferry.migration.handover import (
    DESTINATION,
    IN_DOUBT,
    MAY_RUN,
    SOURCE,
    SOURCE_OF_QEMU,
    Handover,
    Stage,
    Table,
    Word,
)
from vmferry.migration.status import ENDS, UNDER_WAY, Status

QEMU: Table = {
    Stage.LOADING: {**DESTINATION[Stage.LOADING], Word.LOADED: Stage.TAKEN},
    Stage.TAKEN: {},
    Stage.DISCARDED: {},
}
"""A QEMU as the destination: it runs what it has loaded."""

END = "end"
"""What comes behind all else; the other messages are words."""


@dataclass(frozen=True)
class Side:
    stage: Stage
    status: Status = Status.ACTIVE
    lives: bool = True
    open: bool = True
    """Whether its end of the connection is."""
    inbox: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        return self.lives and self.stage in MAY_RUN

    @property
    def holds_all(self) -> bool:
        """Whether it has a whole machine that nobody has gone on with elsewhere, as it sees it."""
        return self.lives and self.stage not in {Stage.LOADING, Stage.DISCARDED, Stage.RELEASED}


@dataclass(frozen=True)
class Pair:
    source: Side
    destination: Side


class Walk:
    """All configurations that can be reached with these two tables."""

    def __init__(self, source: Table, destination: Table) -> None:
        self.source, self.destination = source, destination
        start = Pair(Side(Stage.PRECOPY), Side(Stage.LOADING))
        self.next: dict[Pair, set[Pair]] = {}
        todo = deque([start])
        while todo:
            pair = todo.popleft()
            if pair in self.next:
                continue
            self.next[pair] = set(self._steps(pair))
            todo.extend(self.next[pair])

    def with_two_owners(self) -> list[Pair]:
        return [pair for pair in self.next if pair.source.runs and pair.destination.runs]

    def leading_to_an_owner(self) -> set[Pair]:
        """From where one side comes to run the machine."""
        before: dict[Pair, set[Pair]] = {pair: set() for pair in self.next}
        for pair, following in self.next.items():
            for after in following:
                before[after].add(pair)
        todo = [pair for pair in self.next if pair.source.runs or pair.destination.runs]
        good = set(todo)
        while todo:
            for pair in before[todo.pop()] - good:
                good.add(pair)
                todo.append(pair)
        return good

    # One step

    def _steps(self, pair: Pair) -> Iterator[Pair]:
        source, destination = pair.source, pair.destination
        if source.lives:
            yield replace(pair, source=replace(source, lives=False))
            yield from self._source_steps(pair)
        if destination.lives:
            yield replace(pair, destination=replace(destination, lives=False))
            yield from self._destination_steps(pair)

    def _source_steps(self, pair: Pair) -> Iterator[Pair]:
        source = pair.source
        if source.status is Status.PRE_SWITCHOVER:
            yield replace(pair, source=self._status(source, Status.DEVICE))
        if source.status is Status.CANCELLING:
            yield replace(pair, source=self._status(source, Status.CANCELLED))
        for word in (Word.STOP, Word.SENT, Word.CANCEL, Word.LOST):
            yield from self._source_hears(pair, word)
        # Rightly or wrongly: a connection may be lost though the other side is well.  That the
        # other side is gone is never wrong.
        if not pair.destination.lives or pair.destination.stage is Stage.DISCARDED:
            yield from self._source_hears(pair, Word.GONE)
        if source.open and source.inbox:
            taken = replace(pair, source=replace(source, inbox=source.inbox[1:]))
            yield from self._source_hears(taken, Word(source.inbox[0]), or_not=True)

    def _source_hears(self, pair: Pair, word: Word, *, or_not: bool = False) -> Iterator[Pair]:
        source = pair.source
        to = self.source[source.stage].get(word)
        if to is None:
            if or_not:
                yield pair
            return
        if word is Word.SENT and source.status is Status.PRE_SWITCHOVER:
            return
        moved = replace(source, stage=to)
        match word:
            case Word.STOP:
                yield replace(pair, source=moved)
                yield replace(pair, source=self._status(moved, Status.PRE_SWITCHOVER))
            case Word.SENT:
                yield self._sent(replace(pair, source=moved), END)
            case Word.READY:
                yield self._sent(replace(pair, source=moved), Word.GO)
            case Word.SHUT:
                yield replace(pair, source=self._status(moved, Status.COMPLETED))
            case Word.CANCEL:
                off = replace(pair, source=self._closed(moved, Status.CANCELLING))
                yield off
                yield self._sent(off, Word.REFUSED)
            case _:
                yield replace(pair, source=self._closed(moved, Status.FAILED))

    def _destination_steps(self, pair: Pair) -> Iterator[Pair]:
        destination = pair.destination
        for word in (Word.CANCEL, Word.LOST):
            yield from self._destination_hears(pair, word)
        if not pair.source.lives:
            yield from self._destination_hears(pair, Word.GONE)
        if destination.open and destination.inbox:
            message = destination.inbox[0]
            taken = replace(pair, destination=replace(destination, inbox=destination.inbox[1:]))
            word = Word.LOADED if message == END else Word(message)
            yield from self._destination_hears(taken, word)
            if message == END:  # what has come may be wrong
                yield from self._destination_hears(taken, Word.CANCEL)

    def _destination_hears(self, pair: Pair, word: Word) -> Iterator[Pair]:
        destination = pair.destination
        to = self.destination[destination.stage].get(word)
        if to is None:
            return
        moved = replace(destination, stage=to)
        match to:
            case Stage.READY:
                yield self._answered(replace(pair, destination=moved), Word.READY)
            case Stage.TAKEN:
                taken = replace(pair, destination=self._status(moved, Status.COMPLETED))
                yield self._answered(taken, Word.SHUT)
            case Stage.WAITING:
                yield replace(pair, destination=replace(moved, open=False, inbox=()))
            case _:
                off = replace(pair, destination=self._closed(moved, Status.FAILED))
                yield off
                if word is Word.CANCEL and destination.open:
                    yield self._answered(off, Word.REFUSED)

    # What each step does

    def _sent(self, pair: Pair, message: str) -> Pair:
        to = pair.destination
        if not to.open:
            return pair
        return replace(pair, destination=replace(to, inbox=(*to.inbox, message)))

    def _answered(self, pair: Pair, word: Word) -> Pair:
        to = pair.source
        if not to.open:
            return pair
        return replace(pair, source=replace(to, inbox=(*to.inbox, word)))

    def _closed(self, side: Side, to: Status) -> Side:
        closed = replace(side, open=False, inbox=())
        return self._status(closed, to) if side.status in UNDER_WAY else closed

    def _status(self, side: Side, to: Status) -> Side:
        table = status.DESTINATION if side.stage in DESTINATION else status.SOURCE
        assert to in table[side.status], f"{side.stage}: {side.status} to {to}"
        return replace(side, status=to)


HOSTED = Walk(SOURCE, DESTINATION)
TO_QEMU = Walk(SOURCE_OF_QEMU, QEMU)


@pytest.mark.parametrize(
    ("walk", "visited"), [(HOSTED, 287), (TO_QEMU, 132)], ids=["hosted", "to-qemu"]
)
def test_no_two_owners(walk: Walk, visited: int) -> None:
    joint = {(pair.source.stage, pair.destination.stage) for pair in walk.next}
    sys.stdout.write(f"{len(walk.next)} configurations, {len(joint)} pairs of stages\n")
    assert walk.with_two_owners() == []
    assert len(walk.next) == visited, "the tables say something else than before"


@pytest.mark.parametrize("walk", [HOSTED, TO_QEMU], ids=["hosted", "to-qemu"])
def test_every_stage_is_reached(walk: Walk) -> None:
    seen = {side.stage for pair in walk.next for side in (pair.source, pair.destination)}
    assert seen == (walk.source.keys() | walk.destination.keys()) - (
        {Stage.OFFERED} if walk is TO_QEMU else set()
    )


def replaced(table: Table, stage: Stage, word: Word, to: Stage) -> Table:
    return {**table, stage: {**table[stage], word: to}}


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        # Silence taken for a no.
        (replaced(SOURCE, Stage.GIVEN, Word.LOST, Stage.RESUMED), DESTINATION),
        (replaced(SOURCE_OF_QEMU, Stage.GIVEN, Word.LOST, Stage.RESUMED), QEMU),
        # Silence taken for a yes.
        (SOURCE, replaced(DESTINATION, Stage.READY, Word.LOST, Stage.TAKEN)),
        # A cancel behind the point of no return.
        (replaced(SOURCE, Stage.GIVEN, Word.CANCEL, Stage.RESUMED), DESTINATION),
        # A destination that does not wait, taken for one that does.
        (SOURCE, QEMU),
    ],
)
def test_walk_finds_a_row_too_many(source: Table, destination: Table) -> None:
    assert Walk(source, destination).with_two_owners()


@pytest.mark.parametrize("walk", [HOSTED, TO_QEMU], ids=["hosted", "to-qemu"])
def test_machine_is_lost_only_with_its_owner(walk: Walk) -> None:
    good = walk.leading_to_an_owner()
    for pair in walk.next:
        if pair.source.holds_all or pair.destination.holds_all:
            assert pair in good


@pytest.mark.parametrize("walk", [HOSTED, TO_QEMU], ids=["hosted", "to-qemu"])
def test_the_side_that_is_left_runs_the_machine(walk: Walk) -> None:
    for pair in walk.next:
        source, destination = pair.source, pair.destination
        if not destination.lives and source.holds_all:
            assert source.runs or walk.source[source.stage][Word.GONE] is Stage.RESUMED
        if not source.lives and destination.holds_all:
            assert destination.runs or walk.destination[destination.stage][Word.GONE] is Stage.TAKEN


@pytest.mark.parametrize("walk", [HOSTED, TO_QEMU], ids=["hosted", "to-qemu"])
def test_statuses_say_who_has_the_machine(walk: Walk) -> None:
    for pair in walk.next:
        assert (pair.source.status is Status.COMPLETED) == (pair.source.stage is Stage.RELEASED)
        assert (pair.destination.status is Status.COMPLETED) == (
            pair.destination.stage is Stage.TAKEN
        )
        if pair.source.status in {Status.CANCELLING, Status.CANCELLED}:
            assert pair.source.stage is Stage.RESUMED
        if pair.source.stage is Stage.RESUMED:
            assert pair.source.status in ENDS | {Status.CANCELLING}


def test_doubt_needs_a_loss_behind_the_last_word() -> None:
    """Both in doubt takes GO lost on the way; the source alone, or the destination, less."""
    doubtful = [pair for pair in HOSTED.next if pair.source.stage is Stage.UNKNOWN]
    assert {pair.destination.stage for pair in doubtful} == {
        Stage.READY,
        Stage.WAITING,
        Stage.TAKEN,
        Stage.DISCARDED,
    }
    assert {Stage.UNKNOWN, Stage.WAITING} == IN_DOUBT


@pytest.mark.parametrize("table", [SOURCE, SOURCE_OF_QEMU, DESTINATION])
def test_silence_and_death_move_nobody_from_where_it_is_settled(table: Table) -> None:
    for stage in (Stage.RELEASED, Stage.RESUMED, Stage.TAKEN, Stage.DISCARDED):
        assert not table.get(stage)


def test_words_out_of_turn_change_nothing() -> None:
    handover = Handover(SOURCE)
    assert handover.stage is Stage.PRECOPY
    assert not handover.hear(Word.READY)
    assert handover.hear(Word.STOP)
    assert not handover.may_run
    assert handover.hear(Word.CANCEL)
    assert not handover.hear(Word.SENT)
    assert handover.stage is Stage.RESUMED
    assert handover.may_run


def test_cancel_or_go_but_not_both() -> None:
    for _ in range(200):
        handover = Handover(SOURCE)
        handover.hear(Word.STOP)
        handover.hear(Word.SENT)
        ready, cancel = at_once(
            partial(handover.hear, Word.READY), partial(handover.hear, Word.CANCEL)
        )
        assert ready != cancel
        assert handover.stage is (Stage.GIVEN if ready else Stage.RESUMED)
