"""The record of who owns a machine: one small object beside its images, and its text.

It is changed only by compare-and-swap (:mod:`.store`), and only as :mod:`.protocol` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Final, Self

from vmferry.errors import StorageError, printable

FORMAT: Final = 1
MAX_SIZE: Final = 1 << 16
"""Bytes of the text of a record."""

_MAX_TEXT: Final = 255
_MAX_HISTORY: Final = 64
_MAX_FENCED: Final = 8
_MAX_GENERATION: Final = (1 << 63) - 1


class Phase(StrEnum):
    """What the record says of the machine."""

    FREE = "free"
    """Nobody has it; whoever comes first may."""
    HELD = "held"
    """The owner runs it, or may."""
    OFFERED = "offered"
    """The owner has stopped it and named who is to have it; that one may not take it yet."""
    GRANTED = "granted"
    """The nominee may take it, and the owner may take it back: whoever is first."""
    TAKEN = "taken"
    """The nominee of before is the owner, and has not started it; what is named as nominee now is
    who had it before, and still has all of it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One change, as the history keeps it.

    ``at`` is UTC by the clock of whoever made the change, for people to read: nothing is decided
    by it.  ``forced`` is whether an operator decided it, and ``note`` what the operator stated.
    """

    generation: int
    act: str
    by: str
    at: str = ""
    forced: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Who owns the machine *vm*, whose images are *images* (a name for the set of them).

    ``generation`` counts every change, and none is ever used again.  ``fenced`` are engines of
    which an operator has stated that they cannot run the machine or write its images any more.
    ``checkpoint`` says where the last saved state is, if somebody has said so.
    """

    vm: str
    images: str = ""
    generation: int = 0
    phase: Phase = Phase.FREE
    owner: str = ""
    nominee: str = ""
    fenced: tuple[str, ...] = ()
    checkpoint: str = ""
    history: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        """Raise :class:`~vmferry.errors.StorageError` for what no record can be."""
        _check("generation", 0 <= self.generation <= _MAX_GENERATION, self.generation)
        _check("vm", bool(self.vm), self.vm)
        owned = self.phase is not Phase.FREE
        _check("owner", bool(self.owner) == owned, self.owner)
        named = self.phase in {Phase.OFFERED, Phase.GRANTED, Phase.TAKEN}
        _check("nominee", bool(self.nominee) == named, self.nominee)

    def encode(self) -> bytes:
        """The text that :func:`decode` reads."""
        values = asdict(self)
        return json.dumps({"format": FORMAT} | values, indent=1).encode() + b"\n"

    def remembering(self, entry: Entry) -> tuple[Entry, ...]:
        """The history with one entry more; of too many, the oldest that nobody forced goes."""
        history = [*self.history, entry]
        while len(history) > _MAX_HISTORY:
            unforced = (i for i, old in enumerate(history) if not old.forced)
            history.pop(next(unforced, 0))
        return tuple(history)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """From the values of its text; see :func:`decode`."""
        known = {f.name for f in fields(cls)}
        _check("keys", values.keys() == known, sorted(values))
        history, fenced = values["history"], values["fenced"]
        _check("history", isinstance(history, list) and len(history) <= _MAX_HISTORY, "")
        _check("fenced", isinstance(fenced, list) and len(fenced) <= _MAX_FENCED, "")
        return cls(
            vm=_text("vm", values["vm"]),
            images=_text("images", values["images"]),
            generation=_count("generation", values["generation"]),
            phase=_phase(values["phase"]),
            owner=_text("owner", values["owner"]),
            nominee=_text("nominee", values["nominee"]),
            fenced=tuple(_text("fenced", name) for name in fenced),
            checkpoint=_text("checkpoint", values["checkpoint"]),
            history=tuple(map(_entry, history)),
        )


def decode(text: bytes, where: str) -> Record:
    """The record that *text* is, found at *where*.

    Raises :class:`~vmferry.errors.StorageError` for anything else: who owns the machine is not
    guessed from a damaged record.
    """
    try:
        _check("size", len(text) <= MAX_SIZE, len(text))
        try:
            values = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"not JSON: {error}") from None
        _check("object", isinstance(values, dict), type(values).__name__)
        _check("format", _is_count(values.get("format")) and values["format"] == FORMAT, "")
        return Record.from_json({key: values[key] for key in values if key != "format"})
    except StorageError as error:
        raise StorageError(f"{where}: expected the record of who owns a machine: {error}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    _check("keys that are all different", len(values) == len(pairs), "some twice")
    return values


def _check(what: str, holds: bool, found: object) -> None:
    if not holds:
        raise StorageError(f"bad {what}: found {printable(str(found), 80)}")


def _text(what: str, value: object) -> str:
    good = isinstance(value, str) and len(value) <= _MAX_TEXT and (not value or value.isprintable())
    _check(what, good, value)
    return str(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(what: str, value: object) -> int:
    _check(what, _is_count(value), value)
    assert isinstance(value, int)  # noqa: S101
    return value


def _phase(value: object) -> Phase:
    _check("phase", isinstance(value, str) and value in set(Phase), value)
    return Phase(str(value))


def _entry(values: object) -> Entry:
    _check("history", isinstance(values, dict), values)
    assert isinstance(values, dict)  # noqa: S101
    _check("history", values.keys() == {f.name for f in fields(Entry)}, sorted(map(str, values)))
    _check("history", isinstance(values["forced"], bool), values["forced"])
    return Entry(
        generation=_count("history", values["generation"]),
        act=_text("history", values["act"]),
        by=_text("history", values["by"]),
        at=_text("history", values["at"]),
        forced=values["forced"],
        note=_text("history", values["note"]),
    )
