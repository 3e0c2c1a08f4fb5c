"""What an operator does to a record: see it, and state what no engine can know."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from vmferry.errors import UsageError

from .protocol import Swap
from .record import Entry, Phase, Record
from .store import Outcome, Seen, Store, StoreSilent


def read(store: Store) -> Seen:
    """What there is; raises :class:`UsageError` where there is no record."""
    seen = store.read()
    if seen.record is None:
        raise UsageError(f"{store.uri}: there is no record: the machine never ran with this store")
    return seen


def fence(store: Store, *, engine: str, generation: int, note: str) -> Record:
    """Put into the record that *engine* cannot run the machine or write its images any more.

    Whoever makes that statement has made sure of it.  From then on that engine itself, if it asks,
    is told that the machine is not its own; who it is offered to, or had it before, may have it.
    Raises :class:`UsageError` where the record is not of *generation*, or names no such engine.
    """
    record = _expected(store, generation)
    if engine not in {record.owner, record.nominee}:
        raise UsageError(f"{store.uri}: names no engine {engine}; its owner is {record.owner}")
    return _forced(store, "fence", replace(record, fenced=(*set(record.fenced), engine)[-8:]), note)


def free(store: Store, act: str, *, generation: int, note: str) -> Record:
    """Let whoever starts the machine next have it.

    For an owner that is fenced, or that the store knows to be gone; raises :class:`UsageError` for
    one that may still run it.
    """
    record = _expected(store, generation)
    if record.phase is Phase.FREE:
        return record
    gone = "" if record.owner in record.fenced else record.owner
    freed = replace(record, phase=Phase.FREE, owner="", nominee="", fenced=())
    return _forced(store, act, freed, note, gone=gone)


def _expected(store: Store, generation: int) -> Record:
    record = read(store).record
    if record is None or record.generation != generation:
        found = "none" if record is None else record.generation
        raise UsageError(
            f"{store.uri}: expected generation {generation}, found {found}: look again"
            " (vmferry owner show) before you state anything"
        )
    return record


def _forced(store: Store, act: str, record: Record, note: str, *, gone: str = "") -> Record:
    generation = record.generation + 1
    at = datetime.now(UTC).isoformat(timespec="seconds")
    entry = Entry(generation, act, "operator", at=at, forced=True, note=note)
    changed = replace(record, generation=generation, history=record.remembering(entry))
    seen = read(store)
    if seen.record is None or seen.record.generation != record.generation:
        raise UsageError(f"{store.uri}: the record was changed meanwhile: look again")
    match store.swap(seen, Swap(changed, gone)):
        case Outcome.LANDED:
            return changed
        case Outcome.NOT_GONE:
            raise UsageError(
                f"{store.uri}: {gone} may still run the machine. Make sure that it cannot, and say"
                f" so first: vmferry owner fence {store.uri} --engine {gone} --generation"
                f" {record.generation} --i-have-fenced-it"
            )
        case Outcome.LOST:
            raise UsageError(f"{store.uri}: the record was changed meanwhile: look again")
        case _:
            raise StoreSilent(f"{store.uri}: it is not known whether that was kept: look again")
