"""Never two owners, always a way to one: everything that can happen, step by step."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest

from tests.ownership.model import PARTIES, C, D, Exploration, Rules, S, World
from vmferry.ownership.protocol import MOVES, Act, Party, Stage, Swap, Table, Verdict, Word, judge
from vmferry.ownership.record import Phase, Record


@pytest.fixture(scope="module", params=[True, False], ids=["leases", "no-leases"])
def explored(request: pytest.FixtureRequest) -> Exploration:
    began = time.monotonic()
    found = Exploration(Rules(leases=request.param))
    took = time.monotonic() - began
    sys.stdout.write(f"{len(found.before)} states in {took:.1f} s\n")
    return found


def test_never_two_owners(explored: Exploration) -> None:
    assert explored.violations == []
    assert len(explored.before) > 3_000


def test_a_guest_can_run_from_everywhere(explored: Exploration) -> None:
    running = explored.leading_to(lambda world: any(e.runs for e in world.engines))
    stuck = explored.before.keys() - running
    # All three engines may die; then another one of the same kind as the third can be started.
    assert [w for w in stuck if w.engines[C].lives and w.engines[C].stage is Stage.CLAIMING] == []


def test_state_lives_as_long_as_who_has_it(explored: Exploration) -> None:
    warm = explored.leading_to(lambda w: w.engines[S].runs or w.engines[D].runs)
    assert [w for w in explored.before if holds_the_guest(w) and w not in warm] == []


def holds_the_guest(world: World) -> bool:
    """Whether an engine lives that has the newest state, and nobody has begun anew from disk."""
    record = world.record
    source, destination = (world.engines[who] for who in (S, D))
    named = {record.owner, record.nominee}
    if "C" in named or record.phase is Phase.FREE or named & set(record.fenced) & alive(world):
        return False
    if source.lives and "S" in named and source.stage is not Stage.GONE and not world.started:
        return True
    return (
        destination.lives
        and (record.owner == "D" or record.nominee == PARTIES[D].token)
        and destination.stage in AT_THE_DESTINATION
    )


AT_THE_DESTINATION = {
    *(Stage.TAKING, Stage.TAKEN, Stage.OPENING, Stage.STARTING),
    *(Stage.LOOKING, Stage.LAPSED, Stage.RUNNING),
}


def alive(world: World) -> set[str]:
    return {p.name for p, e in zip(PARTIES, world.engines, strict=True) if e.lives}


def test_every_stage_is_reached(explored: Exploration) -> None:
    seen = {engine.stage for world in explored.before for engine in world.engines}
    assert seen == set(Stage)


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
    "has no guard": Rules(guards=False),
    "takes silence for death": Rules(checks_gone=False),
    "runs when it has lost the record": Rules(
        moves=moving(Stage.REVOKING, Word.NEVER, Stage.RUNNING)
    ),
}


@pytest.mark.parametrize("rules", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_exploration_finds_what_is_wrong(rules: Rules) -> None:
    found = Exploration(rules)
    assert found.violations, f"nothing in {len(found.before)} states"
