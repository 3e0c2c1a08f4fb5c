"""Never two owners, always a way to one: everything that can happen, step by step."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.ownership.model import (
    DESTINATIONS,
    NAMES,
    C,
    Engine,
    Exploration,
    Knows,
    Rules,
    S,
    World,
)
from vmferry.ownership.protocol import (
    MOVES,
    WRITES,
    Act,
    Party,
    Stage,
    Swap,
    Table,
    Verdict,
    Word,
    judge,
)
from vmferry.ownership.record import Phase, Record

WORLDS = {
    "leases": Rules(),
    "leases, tried again": Rules(tries=2, third=False),
    "deaths, tried again": Rules(tries=2, knows=Knows.DEATHS),
    "operator, tried again": Rules(tries=2, knows=Knows.NOTHING),
}


@pytest.fixture(scope="module", params=WORLDS)
def explored(request: pytest.FixtureRequest) -> Iterator[Exploration]:
    began = time.monotonic()
    gc.disable()  # there are no cycles, and looking for them takes half of the time
    found = Exploration(WORLDS[request.param])
    gc.enable()
    took = time.monotonic() - began
    sys.stdout.write(f"{request.param}: {len(found.before)} states in {took:.1f} s\n")
    yield found
    found.before.clear()


def test_never_two_owners(explored: Exploration) -> None:
    assert explored.violations == []
    assert len(explored.before) > 20_000


def test_a_guest_can_run_from_everywhere(explored: Exploration) -> None:
    running = explored.leading_to(lambda world: any(e.runs for e in world.engines))
    stuck = explored.before.keys() - running
    # All engines may die; then another one of the same kind as the third can be started.
    assert [w for w in stuck if w.engines[C].lives and w.engines[C].stage is Stage.CLAIMING] == []


def test_state_lives_as_long_as_who_has_it(explored: Exploration) -> None:
    assert [w for w in explored.before.keys() - warm(explored) if holds_the_guest(w)] == []


def warm(explored: Exploration) -> set[World]:
    """The worlds from which a guest can run that has lost nothing."""
    return explored.leading_to(lambda w: any(e.runs for e in (w.engines[S], *destinations(w))))


def holds_the_guest(world: World) -> bool:
    """Whether an engine lives that has the newest state, and nobody has begun anew from disk."""
    record = world.record
    source = world.engines[S]
    named = {record.owner, record.nominee}
    if "C" in named or record.phase is Phase.FREE or named & set(record.fenced) & alive(world):
        return False
    if source.lives and "S" in named and source.stage is not Stage.GONE and not world.started:
        return True
    latest = world.party(world.destination)
    destination = world.engines[world.destination]
    return (
        destination.lives
        and (record.owner == latest.name or record.nominee == latest.token)
        and destination.stage in AT_THE_DESTINATION
    )


def destinations(world: World) -> list[Engine]:
    return [e for who, e in enumerate(world.engines) if who in DESTINATIONS]


AT_THE_DESTINATION = {
    *(Stage.TAKING, Stage.TAKEN, Stage.OPENING, Stage.STARTING),
    *(Stage.LOOKING, Stage.LAPSED, Stage.RUNNING),
}


def alive(world: World) -> set[str]:
    return {NAMES[who] for who, engine in enumerate(world.engines) if engine.lives}


def test_every_stage_is_reached(explored: Exploration) -> None:
    seen = {engine.stage for world in explored.before for engine in world.engines}
    absent = set() if explored.rules.third else {Stage.CLAIMING}
    assert seen == set(Stage) - absent


# The exploration can fail


def moving(stage: Stage, word: Word, to: Stage) -> Table:
    return {**MOVES, stage: {**MOVES[stage], word: to}}


def takes_without_grant(act: Act, record: Record, me: Party) -> Swap | Verdict:
    found = judge(act, record, me)
    if act is Act.TAKE and isinstance(found, Swap):
        return replace(found, gone="")
    return found


def takes_back_what_was_taken(act: Act, record: Record, me: Party) -> Swap | Verdict:
    found = judge(act, record, me)
    if act is Act.REVOKE and isinstance(found, Swap):
        return replace(found, gone="")
    return found


def takes_what_it_reads_for_a_no(act: Act, record: Record, me: Party) -> Swap | Verdict:
    """A record that does not show the grant: it has not landed, and never will."""
    if act is Act.REVOKE and record.owner == me.name and record.phase is Phase.OFFERED:
        return Verdict.DONE
    return judge(act, record, me)


def is_named(_stage: Stage, record: Record, me: Party) -> Verdict:
    return Verdict.DONE if record.owner == me.name else Verdict.NEVER


def keeps_the_generation(act: Act, record: Record, me: Party) -> Swap | Verdict:
    found = judge(act, record, me)
    if act is Act.REVOKE and isinstance(found, Swap):
        return replace(found, record=replace(found.record, generation=record.generation))
    return found


def names_all_the_same(act: Act, record: Record, me: Party) -> Swap | Verdict:
    return judge(act, record, replace(me, token="to-whoever" if me.token else ""))


def takes_any_revoke_for_its_own(act: Act, record: Record, me: Party) -> Swap | Verdict:
    return judge(act, record, replace(me, floor=0))


def test_offer_on_its_way_is_not_forgotten() -> None:
    """Else it lands behind the REVOKE, and an owner whose lease lapses stands still for good."""
    found = Exploration(Rules(judge=takes_any_revoke_for_its_own))
    assert not found.violations
    assert any(holds_the_guest(world) for world in found.before.keys() - warm(found))


MUTATIONS = {
    "resumes without revoke": Rules(moves=moving(Stage.GRANTED, Word.UNDO, Stage.RUNNING)),
    "resumes with the grant on its way": Rules(
        moves=moving(Stage.GRANTING, Word.UNDO, Stage.RUNNING)
    ),
    "revokes by reading": Rules(judge=takes_what_it_reads_for_a_no, look=is_named),
    "revokes what was taken": Rules(judge=takes_back_what_was_taken),
    "uses a generation again": Rules(judge=keeps_the_generation),
    "runs before it has taken": Rules(moves=moving(Stage.TAKING, Word.UNDO, Stage.RUNNING)),
    "does not look on waking": Rules(look=lambda *_: Verdict.DONE),
    "opens images when it is late": Rules(moves=moving(Stage.TAKING, Word.DONE, Stage.OPENING)),
    "has no guard": Rules(guarded=frozenset()),
    "is not guarded before it offers": Rules(guarded=WRITES - {Stage.STOPPED}),
    "is not guarded before it runs": Rules(guarded=WRITES - {Stage.LOOKING}),
    "takes silence for death": Rules(checks_gone=False),
    "offers to whoever was told before": Rules(judge=names_all_the_same, tries=2, third=False),
    "runs when it has lost the record": Rules(
        moves=moving(Stage.REVOKING, Word.NEVER, Stage.RUNNING)
    ),
}


@pytest.mark.parametrize("rules", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_exploration_finds_what_is_wrong(rules: Rules) -> None:
    found = Exploration(rules)
    assert found.violations, f"nothing in {len(found.before)} states"
