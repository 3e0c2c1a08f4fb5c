"""All that two engines, a third one, an operator and the record can come to.

Breadth first, one step of one of them after another in every order.  What an engine does is what
:mod:`vmferry.ownership.protocol` says: its table and ``judge`` are run here, not copied.  A delay
of any length (a slow network, a frozen process, a scheduler) is an order of steps in which the
others go first, and so is part of every run.

A swap that was sent stays on its way until it lands or fails; its sender may give up waiting before
(the outcome is unknown to it), and it lands later, or never.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

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

S, D, C = 0, 1, 2
NAMES = "SDC"
PARTIES = (
    Party("S", "to-D", floor=1),
    Party("D", "to-D"),
    Party("C"),
)
"""The source, the destination, and a third engine, by which somebody starts the machine anew."""


@dataclass(frozen=True, slots=True)
class Engine:
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


@dataclass(frozen=True, slots=True)
class World:
    record: Record
    engines: tuple[Engine, Engine, Engine]
    ready_said: bool = False
    """READY is on its way to the source, or lost."""
    started: bool = False
    """Somebody else than the source has run the machine."""

    def put(self, who: int, engine: Engine) -> World:
        engines = tuple(engine if i == who else old for i, old in enumerate(self.engines))
        return replace(self, engines=engines)


START = World(
    Record(vm="vm", generation=1, phase=Phase.HELD, owner="S"),
    (Engine(Stage.RUNNING), Engine(Stage.LOADING), Engine(Stage.CLAIMING)),
)


@dataclass
class Rules:
    """What is explored; a mutation is another one of these."""

    moves: Table = field(default_factory=lambda: MOVES)
    judge: Judge = judge
    checks_gone: bool = True
    """Whether the store, or an operator's statement, decides who is gone; else: a guess does."""
    guards: bool = True
    """Whether an engine stops, or is killed, before its lease ends."""
    look: Look = look
    leases: bool = True
    """Whether the store has leases; without, only an operator says that an engine is gone."""


class Exploration:
    def __init__(self, rules: Rules | None = None, *, stop_at: int = 3_000_000) -> None:
        self.rules = rules or Rules()
        self._judge = cache(self.rules.judge)
        self.before: dict[World, list[World]] = {START: []}
        self.violations: list[str] = []
        todo = deque([START])
        while todo and not self.violations:
            world = todo.popleft()
            for after in self._steps(world):
                known = self.before.get(after)
                if known is None:
                    self.before[after] = [world]
                    assert len(self.before) < stop_at
                    self._check(after)
                    todo.append(after)
                else:
                    known.append(world)

    def _check(self, world: World) -> None:
        owners = [PARTIES[who].name for who, one in enumerate(world.engines) if one.writes]
        if len(owners) > 1:
            self.violations.append(f"I1: {owners} run, or write: {world}")
        source = world.engines[S]
        if source.runs and world.started:
            self.violations.append(f"I3: the source runs what is out of date: {world}")

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
                yield world.put(who, replace(engine, lives=False, heard=None, waits=False))
                yield from self._time(world, who)
            yield from self._talks(world, who)
            yield from self._asks(world, who)

    def _dead(self, world: World, who: int) -> Iterator[World]:
        """Its lease ends, or an operator makes sure of it and says so."""
        engine = world.engines[who]
        if engine.lease and self.rules.leases:
            yield world.put(who, replace(engine, lease=False))
        name, record = PARTIES[who].name, world.record
        if name == record.owner and name not in record.fenced:
            generation = record.generation + 1
            said = replace(record, generation=generation, fenced=(name,))
            yield _without_what_cannot_land(replace(world, record=said))

    def _time(self, world: World, who: int) -> Iterator[World]:
        """The lease of an engine that lives ends: it was slow, frozen, or cut off."""
        engine = world.engines[who]
        if not engine.lease or not self.rules.leases:
            if not engine.writes:
                yield world.put(who, replace(engine, lease=True))
            return
        if engine.writes and self.rules.guards:
            # In time, by its guard; or if it is frozen, by the kernel.
            yield self._moved(world, who, Word.LAPSE, lease=False)
            yield world.put(who, replace(engine, lives=False, lease=False, heard=None, waits=False))
        else:
            yield world.put(who, replace(engine, lease=False))

    def _talks(self, world: World, who: int) -> Iterator[World]:
        """What one engine does because of the other, or by itself."""
        stage = world.engines[who].stage
        if who == S:
            for word in (Word.STOP, Word.OFFER, Word.UNDO):
                if stage is Stage.RUNNING and world.record.generation > 1:
                    continue  # one migration
                yield from self._hears(world, who, word)
            if world.engines[D].runs:
                yield from self._hears(world, who, Word.GIVEN)
            if world.ready_said:
                yield from self._hears(world, who, Word.READY)
        if who == D:
            for word in (Word.UNDO, Word.START):
                yield from self._hears(world, who, word)
            # The last state leaves the source when the offer has landed.
            sent = world.engines[S].stage in {Stage.OFFERED, Stage.GRANTING, Stage.GRANTED}
            if stage is Stage.LOADING and sent:
                said = replace(world, ready_said=True)
                yield from self._hears(said, who, Word.READY)

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
            yield world.put(who, replace(engine, waits=False))
        elif engine.heard is None:
            yield from self._reads(world, who)
        else:
            yield self._moved(world, who, Word(engine.heard))

    def _looks_again(self, world: World, who: int) -> Iterator[World]:
        # One transaction: the record is as it was read, and the lease counts again.
        match self.rules.look(world.engines[who].stage, world.record, PARTIES[who]):
            case Verdict.DONE:
                yield self._moved(world, who, Word.DONE, lease=True)
            case Verdict.NEVER:
                yield self._moved(world, who, Word.NEVER)
            case _:
                pass

    def _reads(self, world: World, who: int) -> Iterator[World]:
        engine, generation = world.engines[who], world.record.generation
        match self._judge(WANTS[engine.stage], world.record, PARTIES[who]):
            case Verdict.WAIT:
                pass
            case Verdict() as verdict:
                yield world.put(who, replace(engine, heard=verdict))
            case Swap() as swap if len(engine.flying) < 2:
                swap = replace(swap, record=replace(swap.record, history=()))
                flying = tuple(dict.fromkeys((*engine.flying, (generation, swap))))
                yield world.put(who, replace(engine, flying=flying, waits=True))

    def _lands(self, world: World, who: int) -> Iterator[World]:
        """A swap arrives, is lost, or is answered."""
        engine = world.engines[who]
        for index, (generation, swap) in enumerate(engine.flying):
            rest = engine.flying[:index] + engine.flying[index + 1 :]
            answers = engine.waits and index == len(engine.flying) - 1
            fits = generation == world.record.generation and self._is_gone(world, swap.gone)
            gone = replace(engine, flying=rest, waits=engine.waits and not answers)
            yield world.put(who, gone)  # lost, or answered: not landed
            if fits:
                landed = _without_what_cannot_land(replace(world, record=swap.record))
                if swap.record.owner != "S" and swap.record.phase is Phase.HELD:
                    landed = replace(landed, started=True)
                # Its answer is lost, or comes.
                yield landed
                if answers and engine.lives:
                    yield self._moved(landed, who, Word.DONE)

    def _is_gone(self, world: World, name: str) -> bool:
        if not name or not self.rules.checks_gone:
            return True
        engine = world.engines[NAMES.index(name)]
        return not engine.lease

    def _moved(self, world: World, who: int, word: Word, *, lease: bool | None = None) -> World:
        engine = world.engines[who]
        to = self.rules.moves[engine.stage][word]
        kept = engine.lease if lease is None else lease
        if to in WRITES and not kept and self.rules.guards:
            to = self.rules.moves[to][Word.LAPSE]
        return world.put(who, replace(engine, stage=to, heard=None, waits=False, lease=kept))


def _without_what_cannot_land(world: World) -> World:
    """Swaps that compare with a record that has gone: whatever is said of them, nothing changes."""
    now = world.record.generation
    engines = []
    for engine in world.engines:
        flying = tuple(flight for flight in engine.flying if flight[0] >= now)
        # Whoever waits for the answer to one of those will hear, or not: it asks again.
        waits = engine.waits and bool(flying) and flying[-1] == engine.flying[-1]
        engines.append(replace(engine, flying=flying, waits=waits))
    first, second, third = engines
    return replace(world, engines=(first, second, third))
