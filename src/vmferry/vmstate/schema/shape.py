"""What is on the wire for a declared field, as far as its declaration tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from .model import FieldSchema

GAP = "unused"
"""What QEMU and vmferry call bytes without meaning."""

MARKED: Final = frozenset({"qtailq", "qlist", "gtree"})
"""Types that are states with marks between them."""

_STRUCTS: Final = frozenset({"struct", "vstruct", "tmp"})
_BYTES: Final = frozenset({"buffer", "unused_buffer"})


@dataclass(frozen=True, slots=True)
class Leaf:
    """A plain value or bytes, or an array of them."""

    size: int
    count: int | None

    @property
    def total(self) -> int:
        """Bytes of all elements, where they are told."""
        return self.size * (self.count or 1)


def leaves(fields: Iterable[FieldSchema]) -> list[Leaf] | None:
    """What *fields* are made of, states in them taken apart.

    ``None`` where that does not tell what is on the wire: for conditions, sizes that are not fixed,
    arrays of states, and states with subsections.
    """
    found: list[Leaf] = []
    for field in fields:
        if field.conditional or field.counted or field.type in MARKED:
            return None
        if field.struct is None:
            if not field.size:
                return None
            found.append(Leaf(field.size, field.count))
            continue
        if field.count is not None or field.struct.subsections:
            return None
        inner = leaves(member for _, member in field.inside())
        if inner is None:
            return None
        found += inner
    return found


def total(values: Iterable[Leaf]) -> int:
    """Bytes of all of them."""
    return sum(value.total for value in values)


def is_gap(fields: Sequence[FieldSchema]) -> bool:
    """Whether there is nothing but bytes without meaning."""
    return all(field.name == GAP for field in fields)


def same_type(one: str | None, other: str | None) -> bool:
    """Whether two types, as far as they are known, have the same bytes for the same value."""
    if one is None or other is None or one == other:
        return True
    return any({one, other} <= alike for alike in (_STRUCTS, _BYTES))


def form(field: FieldSchema) -> str:
    """What a field is made of, in words."""
    if field.struct is not None:
        words = f"state {field.struct.name}"
    elif field.size:
        words = f"{field.size} byte{'s' * (field.size != 1)}"
    else:
        words = "bytes of no fixed number"
    if field.type is not None and field.type not in _STRUCTS:
        words += f" of {field.type}"
    if field.count is not None:
        words = f"{'at most ' * field.counted}{field.count} times {words}"
    return f"{words}, under a condition" if field.conditional else words


def forms(fields: Iterable[FieldSchema]) -> str:
    """Names and forms of several."""
    return " and ".join(f"{field.name} ({form(field)})" for field in fields)
