"""All that a source, its destinations, an engine started by hand, and an operator can come to.

Breadth first, one step of one of them after another in every order.  What an engine does is what
:mod:`vmferry.ownership.protocol` says: its table and ``judge`` are run here, not copied.  A delay
of any length (a slow network, a frozen process, a scheduler) is an order of steps in which the
others go first, and so is part of every run.

A swap that was sent stays on its way until it lands or fails; its sender may give up waiting before
(the outcome is unknown to it), and it lands later, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from vmferry.ownership.protocol import (
    LOOKS,
    MOVES,
    WANTS,
    WRITES,
    Act,
    Party,
    Stage,
    Swap,
    Table,
    Verdict,
    Word,
    judge,
    look,
)
from vmferry.ownership.record import Phase, Record

Judge = Callable[[Act, Record, Party], Swap | Verdict]
Look = Callable[[Stage, Record, Party], Verdict]

S, D, C, E = 0, 1, 2, 3
NAMES = "SDCE"
DESTINATIONS = (D, E)
"""Of the first migration, and of the one that is tried behind it."""


class Engine(NamedTuple):
    stage: Stage
    lives: bool = True
    lease: bool = True
    heard: Verdict | None = None
    """What it has read from the record, until it acts on it."""
    flying: tuple[tuple[int, Swap], ...] = ()
    """Swaps on their way, each with the generation that it compares with."""
    waits: bool = False
    """Whether it waits for the answer to the last of them."""

    @property
    def runs(self) -> bool:
        return self.lives and self.stage is Stage.RUNNING

    @property
    def writes(self) -> bool:
        return self.lives and self.stage in WRITES


class World(NamedTuple):
    record: Record
    engines: tuple[Engine, ...]
    begun: int = 0
    """How many migrations the source has begun."""
    floor: int = 1
    """The generation before the offer of the latest attempt."""
    sent: frozenset[int] = frozenset()
    """The destinations to which the last state was sent; it may come at any time, or not."""
    said: frozenset[Word] = frozenset()
    """What is on its way to the source from the destination of the latest attempt, or lost."""
    started: bool = False
    """Somebody else than the source has run the machine."""
    fresh: bool = False
    """The source has not run the machine since it has sent the last state."""

    def put(self, who: int, engine: Engine) -> World:
        engines = (*self.engines[:who], engine, *self.engines[who + 1 :])
        return World(
            *(self.record, engines, self.begun, self.floor),
            *(self.sent, self.said, self.started, self.fresh),
        )

    @property
    def destination(self) -> int:
        """That of the latest attempt."""
        return DESTINATIONS[max(self.begun - 1, 0)]

    def says(self, who: int, word: Word) -> World:
        """What *who* says to the source; one of an earlier attempt is not heard any more."""
        heard = who == self.destination
        return self._replace(said=self.said | {word}) if heard else self

    def party(self, who: int) -> Party:
        if who == S:
            return Party("S", f"to-{NAMES[self.destination]}", self.floor)
        return Party(NAMES[who], f"to-{NAMES[who]}" if who in DESTINATIONS else "")


HELD_BY_SOURCE = Record(vm="vm", generation=1, phase=Phase.HELD, owner="S")


class Knows(StrEnum):
    """How a store can tell that an engine is gone; an operator can say so with each."""

    LEASES = "leases"
    DEATHS = "deaths"
    """It sees that a process is dead: a file, where all are on one host."""
    NOTHING = "nothing"


@dataclass
class Rules:
    """What is explored; a mutation is another one of these."""

    moves: Table = field(default_factory=lambda: MOVES)
    judge: Judge = judge
    checks_gone: bool = True
    """Whether the store, or an operator's statement, decides who is gone; else: a guess does."""
    guarded: Set[Stage] = WRITES
    """Where an engine stops, or is killed, before its lease ends."""
    look: Look = look
    knows: Knows = Knows.LEASES
    tries: int = 1
    """How many migrations the source begins."""
    third: bool = True
    """Whether somebody starts the machine by hand."""


class Exploration:
    def __init__(self, rules: Rules | None = None, *, stop_at: int = 3_000_000) -> None:
        self.rules = rules or Rules()
        self._judge = cache(self.rules.judge)
        waiting = [Engine(Stage.LOADING)] * self.rules.tries
        waiting.insert(1, Engine(Stage.CLAIMING if self.rules.third else Stage.GONE))
        start = World(HELD_BY_SOURCE, (Engine(Stage.RUNNING), *waiting))
        self.before: dict[World, list[World]] = {start: []}
        self.violations: list[str] = []
        todo = deque([start])
        while todo and not self.violations:
            world = todo.popleft()
            for after in map(_plain, self._steps(world)):
                known = self.before.get(after)
                if known is None:
                    self.before[after] = [world]
                    assert len(self.before) < stop_at
                    self._check(after)
                    todo.append(after)
                else:
                    known.append(world)

    def _check(self, world: World) -> None:
        owners = [NAMES[who] for who, one in enumerate(world.engines) if one.writes]
        if len(owners) > 1:
            self.violations.append(f"I1: {owners} run, or write: {world}")
        source = world.engines[S]
        if source.runs and world.started:
            self.violations.append(f"I3: the source runs what is out of date: {world}")
        for who in DESTINATIONS[: self.rules.tries]:
            latest = who == world.destination and world.fresh
            if world.engines[who].runs and not latest:
                self.violations.append(f"I3: {NAMES[who]} runs what is out of date: {world}")

    def leading_to(self, good: Callable[[World], bool]) -> set[World]:
        """The worlds from which one that is *good* can come about."""
        found = {world for world in self.before if good(world)}
        todo = list(found)
        while todo:
            for world in self.before[todo.pop()]:
                if world not in found:
                    found.add(world)
                    todo.append(world)
        return found

    # Steps

    def _steps(self, world: World) -> Iterator[World]:
        for who, engine in enumerate(world.engines):
            yield from self._lands(world, who)
            if not engine.lives:
                yield from self._dead(world, who)
                continue
            if who != C:
                yield world.put(who, engine._replace(lives=False, heard=None, waits=False))
            yield from self._time(world, who)
            yield from self._talks(world, who)
            yield from self._asks(world, who)

    def _dead(self, world: World, who: int) -> Iterator[World]:
        """Its lease ends, or an operator makes sure of it and says so, or frees the machine."""
        engine = world.engines[who]
        if engine.lease and self.rules.knows is Knows.LEASES:
            yield world.put(who, engine._replace(lease=False))
        name, record = NAMES[who], world.record
        if name == record.owner:
            said = replace(record, generation=record.generation + 1)
            if name not in record.fenced:
                fenced = replace(said, fenced=(name,))
                yield _without_what_cannot_land(world._replace(record=fenced))
            if name in record.fenced or self._is_gone(world, name):
                free = replace(said, phase=Phase.FREE, owner="", nominee="", fenced=())
                yield _without_what_cannot_land(world._replace(record=free))

    def _time(self, world: World, who: int) -> Iterator[World]:
        """The lease of an engine that lives ends: it was slow, frozen, or cut off."""
        engine = world.engines[who]
        if self.rules.knows is not Knows.LEASES:
            return
        if not engine.lease:
            if not engine.writes and engine.stage is not Stage.GONE:
                yield world.put(who, engine._replace(lease=True))
            return
        if engine.stage in self.rules.guarded:
            # In time, by its guard; or if it is frozen, by the kernel.
            yield self._moved(world, who, Word.LAPSE, lease=False)
            if who != C:
                yield world.put(
                    who, engine._replace(lives=False, lease=False, heard=None, waits=False)
                )
        else:
            yield world.put(who, engine._replace(lease=False))

    def _talks(self, world: World, who: int) -> Iterator[World]:
        """What one engine does because of the other, or by itself."""
        stage = world.engines[who].stage
        if who == S:
            if world.begun < self.rules.tries:
                new = world._replace(begun=world.begun + 1, said=frozenset())
                yield from self._hears(new, who, Word.STOP)
            if stage is Stage.STOPPED:
                # It has read the record, and told the destination who it is.
                floor = world.record.generation
                yield from self._hears(world._replace(floor=floor), who, Word.OFFER)
            yield from self._hears(world, who, Word.UNDO)
            for word in world.said:
                heard = world._replace(said=world.said - {word})
                yield from self._hears(heard, who, word)
        if who in DESTINATIONS:
            for word in (Word.UNDO, Word.START):
                yield from self._hears(world, who, word)
            if who in world.sent:
                yield from self._hears(world.says(who, Word.READY), who, Word.READY)

    def _hears(self, world: World, who: int, word: Word) -> Iterator[World]:
        if word in self.rules.moves[world.engines[who].stage]:
            yield self._moved(world, who, word)

    def _asks(self, world: World, who: int) -> Iterator[World]:
        """What an engine does to have what its stage wants of the record."""
        engine = world.engines[who]
        if engine.stage in LOOKS:
            yield from self._looks_again(world, who)
            return
        if engine.stage not in WANTS:
            return
        if engine.waits:  # its patience may end
            yield world.put(who, engine._replace(waits=False))
        elif engine.heard is None:
            yield from self._reads(world, who)
        else:
            yield self._moved(world, who, Word(engine.heard))

    def _looks_again(self, world: World, who: int) -> Iterator[World]:
        # One transaction: the record is as it was read, and the lease counts again.
        match self.rules.look(world.engines[who].stage, world.record, world.party(who)):
            case Verdict.DONE:
                yield self._moved(world, who, Word.DONE, lease=True)
            case Verdict.NEVER:
                yield self._moved(world, who, Word.NEVER)
            case _:
                pass

    def _reads(self, world: World, who: int) -> Iterator[World]:
        engine, generation = world.engines[who], world.record.generation
        match self._judge(WANTS[engine.stage], world.record, world.party(who)):
            case Verdict.WAIT:
                pass
            case Verdict() as verdict:
                yield world.put(who, engine._replace(heard=verdict))
            case Swap() as swap if len(engine.flying) < 2:
                swap = replace(swap, record=replace(swap.record, history=()))
                flying = tuple(dict.fromkeys((*engine.flying, (generation, swap))))
                yield world.put(who, engine._replace(flying=flying, waits=True))

    def _lands(self, world: World, who: int) -> Iterator[World]:
        """A swap arrives, is lost, or is answered."""
        engine = world.engines[who]
        for index, (generation, swap) in enumerate(engine.flying):
            rest = engine.flying[:index] + engine.flying[index + 1 :]
            answers = engine.waits and index == len(engine.flying) - 1
            fits = generation == world.record.generation and self._is_gone(world, swap.gone)
            gone = engine._replace(flying=rest, waits=engine.waits and not answers)
            yield world.put(who, gone)  # lost, or answered: not landed
            if fits:
                landed = _without_what_cannot_land(world._replace(record=swap.record))
                if swap.record.owner != "S" and swap.record.phase is Phase.HELD:
                    landed = landed._replace(started=True)
                # Its answer is lost, or comes.
                yield landed
                if answers and engine.lives:
                    yield self._moved(landed, who, Word.DONE)

    def _is_gone(self, world: World, name: str) -> bool:
        if not name or not self.rules.checks_gone:
            return True
        engine = world.engines[NAMES.index(name)]
        return not (engine.lives if self.rules.knows is Knows.DEATHS else engine.lease)

    def _moved(self, world: World, who: int, word: Word, *, lease: bool | None = None) -> World:
        engine = world.engines[who]
        to = self.rules.moves[engine.stage][word]
        kept = engine.lease if lease is None else lease
        if to in self.rules.guarded and not kept:
            to = self.rules.moves[to][Word.LAPSE]
        if who == S and to is Stage.OFFERED:
            world = world._replace(sent=world.sent | {world.destination}, fresh=True)
        if who == S and to is Stage.RUNNING:
            world = world._replace(fresh=False)
        if who in DESTINATIONS and to is Stage.RUNNING:
            world = world.says(who, Word.GIVEN)
        return world.put(who, engine._replace(stage=to, heard=None, waits=False, lease=kept))


def _without_what_cannot_land(world: World) -> World:
    """Swaps that compare with a record that has gone: whatever is said of them, nothing changes."""
    now = world.record.generation
    engines = []
    for engine in world.engines:
        if not engine.flying:
            engines.append(engine._replace(waits=False) if engine.waits else engine)
            continue
        flying = tuple(flight for flight in engine.flying if flight[0] >= now)
        # Whoever waits for the answer to one of those will hear, or not: it asks again.
        waits = engine.waits and bool(flying) and flying[-1] == engine.flying[-1]
        engines.append(engine._replace(flying=flying, waits=waits))
    return world._replace(engines=tuple(engines))


_NOW = 2


def _plain(world: World) -> World:
    """The same world without what makes no difference to anything that can follow.

    Whatever is on its way compares with the record as it is now, and so a generation only says
    whether the latest offer was revoked.
    """
    later = world.record.generation - _NOW
    engines = tuple(
        engine if engine.lives and not engine.flying else _plain_engine(engine, later)
        for engine in world.engines
    )
    lost = engines[S].stage is Stage.GONE
    sent, said = world.sent, world.said
    return World(
        _plain_record(world.record) if later else world.record,
        engines,
        begun=world.begun,
        floor=_NOW if lost else max(min(world.floor - later, _NOW), _NOW - 1),
        sent=sent and frozenset(who for who in sent if engines[who].stage is Stage.LOADING),
        said=said and frozenset(() if lost else said),
        started=world.started and not lost,
        fresh=world.fresh,
    )


@cache
def _plain_record(record: Record) -> Record:
    return replace(record, generation=_NOW)


@cache
def _plain_engine(engine: Engine, later: int) -> Engine:
    if not engine.lives:
        engine = engine._replace(stage=Stage.GONE, heard=None, waits=False)
    flying = tuple(
        (when - later, replace(swap, record=_before(swap.record, later)))
        for when, swap in engine.flying
    )
    return engine._replace(flying=flying)


def _before(record: Record, later: int) -> Record:
    return replace(record, generation=record.generation - later)
