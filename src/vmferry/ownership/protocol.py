"""Who may run a machine: pure functions and one table, for every engine and for operators.

Between two engines, with the record in the middle::

    owner S                      record               nominee D
    STOPPED, flushed, inactive   held by S
    OFFERING   ----------------> offered to D
    OFFERED    the last state, end of stream  ------> loads, checks, READY
    GRANTING   ----------------> granted to D
    GRANTED    a word that it is, only a hint ------> reads the record
                                 taken by D    <----- TAKING
                                              images become active
                                 held by D     <----- STARTING
    GONE                                              RUNNING

Until TAKE has landed S may come back, by REVOKE and not without it; the two change the same record,
and so one of them wins.  The rules that keep two engines from running one machine:

* A change is compare-and-swap on the record as it was read.
* An engine acts on a swap that has *landed*, or on a read that shows its own having landed.  What
  a read does not show may still be on its way: no read says that a swap has failed, only another
  swap, which excludes it.
* An engine that cannot know is *in doubt*: it does not run, does not write, keeps its memory, and
  asks again.
* Time says nothing of another engine.  That it is gone says the store, where it can (a lease that
  has ended, a process of this host that is dead), or an operator's statement in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from .record import Entry, Phase, Record


class Act(StrEnum):
    """A change of the record."""

    CLAIM = "claim"
    """Become the owner of a machine that nobody has, or whose owner is gone."""
    OFFER = "offer"
    GRANT = "grant"
    REVOKE = "revoke"
    """The owner takes the machine back, or has it back from one that took it and is gone."""
    TAKE = "take"
    START = "start"
    """The new owner runs the machine from here on: what is left at the old one is out of date."""
    RETURN = "return"
    """The nominee declines, or as the new owner cannot start the machine and gives it back."""
    RELEASE = "release"
    """The owner has ended, and the images are as it left them."""


@dataclass(frozen=True, slots=True)
class Party:
    """Who asks: its name in the record, and *token*, by which a migration names its nominee.

    *floor* is the generation that the record had before the first offer of this migration.
    """

    name: str
    token: str = ""
    floor: int = 0


@dataclass(frozen=True, slots=True)
class Swap:
    """The record is to become *record*; *gone* is an engine that has to be gone, or empty."""

    record: Record
    gone: str = ""


class Verdict(StrEnum):
    """What a record that was read says to an engine that wants something of it."""

    DONE = "done"
    WAIT = "wait"
    """Not now: somebody else has to do something first."""
    NEVER = "never"
    """The record is another one's."""


def judge(act: Act, record: Record, party: Party) -> Swap | Verdict:
    """What an engine that wants *act* does about a *record* it has read.

    A swap with ``gone`` is for a store that can say so, at the same instant; where it cannot, or
    says no, that swap changes nothing and counts as WAIT.
    """
    if party.name in record.fenced:
        return Verdict.NEVER
    return _RULES[act](record, party)


def look(stage: Stage, record: Record, party: Party) -> Verdict:
    """What a record says to an engine in a stage of :data:`LOOKS`.

    Where that is DONE, its lease has to count at the same instant.
    """
    if party.name in record.fenced or record.owner != party.name:
        return Verdict.NEVER
    return Verdict.DONE if record.phase is LOOKS[stage] else Verdict.WAIT


def _claim(record: Record, me: Party) -> Swap | Verdict:
    if record.phase is Phase.FREE:
        return _changed(record, Act.CLAIM, me, Phase.HELD, me.name)
    if _is_held(record, me):
        return Verdict.DONE
    return _if_gone(record, _changed(record, Act.CLAIM, me, Phase.HELD, me.name))


def _offer(record: Record, me: Party) -> Swap | Verdict:
    if record.owner != me.name:
        return Verdict.NEVER
    if record.phase is Phase.OFFERED and record.nominee == me.token:
        return Verdict.DONE
    if record.phase is not Phase.HELD:
        return Verdict.NEVER
    return _changed(record, Act.OFFER, me, Phase.OFFERED, me.name, me.token)


def _grant(record: Record, me: Party) -> Swap | Verdict:
    match record.phase:
        case Phase.OFFERED if record.owner == me.name and record.nominee == me.token:
            return _changed(record, Act.GRANT, me, Phase.GRANTED, me.name, me.token)
        case Phase.GRANTED if record.owner == me.name and record.nominee == me.token:
            return Verdict.DONE
        case _ if record.owner != me.name:  # it has landed, and was taken
            return Verdict.DONE
    return Verdict.NEVER


def _revoke(record: Record, me: Party) -> Swap | Verdict:
    back = _changed(record, Act.REVOKE, me, Phase.HELD, me.name)
    if record.phase is Phase.TAKEN and record.nominee == me.name:
        return _if_gone(record, back)
    if record.owner != me.name:
        return Verdict.NEVER
    # Held as before the offer: an offer may still be on its way, and this one excludes it.
    if _is_held(record, me) and record.generation > me.floor:
        return Verdict.DONE
    return back


def _take(record: Record, me: Party) -> Swap | Verdict:
    if record.owner == me.name:
        return Verdict.DONE
    if record.nominee != me.token or record.phase not in {Phase.OFFERED, Phase.GRANTED}:
        return Verdict.NEVER
    taken = _changed(record, Act.TAKE, me, Phase.TAKEN, me.name, record.owner)
    if record.phase is Phase.GRANTED:
        return taken
    return _if_gone(record, taken)


def _start(record: Record, me: Party) -> Swap | Verdict:
    if record.owner != me.name:
        return Verdict.NEVER
    if record.phase is Phase.TAKEN:
        return _changed(record, Act.START, me, Phase.HELD, me.name)
    return Verdict.DONE if record.phase is Phase.HELD else Verdict.NEVER


def _return(record: Record, me: Party) -> Swap | Verdict:
    if record.owner == me.name:
        if record.phase is Phase.TAKEN:
            return _changed(record, Act.RETURN, me, Phase.HELD, record.nominee)
        return Verdict.NEVER  # too late: it was started
    if record.nominee == me.token and record.phase in {Phase.OFFERED, Phase.GRANTED}:
        # A take may still be on its way, and this one excludes it.
        return _changed(record, Act.RETURN, me, Phase.HELD, record.owner)
    return Verdict.DONE


def _release(record: Record, me: Party) -> Swap | Verdict:
    if not _is_held(record, me):
        return Verdict.DONE
    return _changed(record, Act.RELEASE, me, Phase.FREE)


_RULES: Final = {
    Act.CLAIM: _claim,
    Act.OFFER: _offer,
    Act.GRANT: _grant,
    Act.REVOKE: _revoke,
    Act.TAKE: _take,
    Act.START: _start,
    Act.RETURN: _return,
    Act.RELEASE: _release,
}


def _is_held(record: Record, me: Party) -> bool:
    return record.phase is Phase.HELD and record.owner == me.name


def _if_gone(record: Record, changed: Swap) -> Swap:
    """That swap, where the owner is gone: as an operator has stated, or the store will say."""
    return changed if record.owner in record.fenced else replace(changed, gone=record.owner)


def _changed(
    record: Record, act: Act, me: Party, phase: Phase, owner: str = "", nominee: str = ""
) -> Swap:
    generation = record.generation + 1
    return Swap(
        replace(
            record,
            generation=generation,
            phase=phase,
            owner=owner,
            nominee=nominee,
            fenced=tuple(name for name in record.fenced if name in {owner, nominee}),
            history=record.remembering(Entry(generation, str(act), me.name)),
        )
    )


class Stage(StrEnum):
    """What an engine may do with the machine; it runs in RUNNING, and nowhere else."""

    CLAIMING = "claiming"
    """It has the images, and is not the owner yet."""
    RUNNING = "running"
    STOPPED = "stopped"
    """It is the owner, and has stopped the machine for the switchover; its images are let go of."""
    OFFERING = "offering"
    OFFERED = "offered"
    GRANTING = "granting"
    GRANTED = "granted"
    REVOKING = "revoking"
    LOOKING = "looking"
    """It is the owner and its lease counts; it looks at the record before the machine runs."""
    LAPSED = "lapsed"
    """It is the owner as far as it knows, and stopped until its lease counts again."""
    GONE = "gone"
    """The machine is another engine's."""

    LOADING = "loading"
    TAKING = "taking"
    """It has all of the machine, and waits until it may have it."""
    TAKEN = "taken"
    """It is the owner as far as it knows; its lease is looked at."""
    OPENING = "opening"
    """Its images become active."""
    STARTING = "starting"
    RETURNING = "returning"


class Word(StrEnum):
    """What moves an engine on."""

    DONE = "done"
    """What it wants of the record has come to be."""
    NEVER = "never"
    """It cannot come to be any more."""
    STOP = "stop"
    OFFER = "offer"
    READY = "ready"
    """The destination has everything, and has said so; or this side has."""
    GIVEN = "given"
    """The destination has said that it runs the machine."""
    UNDO = "undo"
    """The migration has failed on this side, or is not wanted any more."""
    START = "start"
    LAPSE = "lapse"
    """The lease was not renewed in time."""


Table = Mapping[Stage, Mapping[Word, Stage]]

MOVES: Final[Table] = {
    # Before an engine runs or writes anything it looks at its lease together with the record: who
    # was slow to hear that a swap has landed may have lost both by then.
    Stage.CLAIMING: {Word.DONE: Stage.LAPSED, Word.NEVER: Stage.GONE},
    Stage.RUNNING: {Word.STOP: Stage.STOPPED, Word.LAPSE: Stage.LAPSED},
    Stage.LAPSED: {Word.DONE: Stage.RUNNING, Word.NEVER: Stage.GONE},
    Stage.LOOKING: {Word.DONE: Stage.RUNNING, Word.NEVER: Stage.GONE, Word.LAPSE: Stage.LAPSED},
    Stage.STOPPED: {
        Word.OFFER: Stage.OFFERING,
        Word.UNDO: Stage.LOOKING,
        Word.LAPSE: Stage.LAPSED,
    },
    Stage.OFFERING: {
        Word.DONE: Stage.OFFERED,
        Word.NEVER: Stage.REVOKING,
        Word.UNDO: Stage.REVOKING,
    },
    Stage.OFFERED: {Word.READY: Stage.GRANTING, Word.UNDO: Stage.REVOKING},
    Stage.GRANTING: {
        Word.DONE: Stage.GRANTED,
        Word.NEVER: Stage.REVOKING,
        Word.UNDO: Stage.REVOKING,
    },
    Stage.GRANTED: {Word.GIVEN: Stage.GONE, Word.UNDO: Stage.REVOKING},
    Stage.REVOKING: {Word.DONE: Stage.LAPSED, Word.NEVER: Stage.GONE},
    Stage.LOADING: {Word.READY: Stage.TAKING, Word.UNDO: Stage.GONE},
    Stage.TAKING: {Word.DONE: Stage.TAKEN, Word.NEVER: Stage.GONE, Word.UNDO: Stage.RETURNING},
    Stage.TAKEN: {
        Word.DONE: Stage.OPENING,
        Word.NEVER: Stage.GONE,
        Word.UNDO: Stage.RETURNING,
    },
    Stage.OPENING: {
        Word.START: Stage.STARTING,
        Word.UNDO: Stage.RETURNING,
        Word.LAPSE: Stage.RETURNING,
    },
    Stage.STARTING: {
        Word.DONE: Stage.LOOKING,
        Word.NEVER: Stage.GONE,
        Word.LAPSE: Stage.RETURNING,
    },
    Stage.RETURNING: {Word.DONE: Stage.GONE, Word.NEVER: Stage.LAPSED},
    Stage.GONE: {},
}

WANTS: Final[Mapping[Stage, Act]] = {
    Stage.CLAIMING: Act.CLAIM,
    Stage.OFFERING: Act.OFFER,
    Stage.GRANTING: Act.GRANT,
    Stage.REVOKING: Act.REVOKE,
    Stage.TAKING: Act.TAKE,
    Stage.STARTING: Act.START,
    Stage.RETURNING: Act.RETURN,
}
"""What an engine wants of the record, where it wants something."""

LOOKS: Final[Mapping[Stage, Phase]] = {
    Stage.LOOKING: Phase.HELD,
    Stage.LAPSED: Phase.HELD,
    Stage.TAKEN: Phase.TAKEN,
}
"""Where an engine looks at its lease and the record, and what that has to say of its machine."""

WRITES: Final = frozenset(
    {Stage.RUNNING, Stage.STOPPED, Stage.OPENING, Stage.STARTING, Stage.LOOKING}
)
"""Where images are open, or may be: closing one writes too.  An engine is in none of these when its
lease may have ended."""
