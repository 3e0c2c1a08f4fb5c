"""The JSON that describes saved bytes, as text: it is written while the bytes are.

The schema is that of QEMU 7.2 ``migration/vmstate.c``.  What describes a value are members of an
object, without the braces (``"type": "uint8", "size": 1``), so that what always is the same is
written once for each class, and put together from there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Final

from . import plan as p

NULL: Final = '"type": "nullptr", "size": 1'
"""What describes a NULL pointer."""

_EQUAL: Final = {
    "uint8": "uint8 equal",
    "uint16": "uint16 equal",
    "int32": "int32 equal",
    "uint32": "uint32 equal",
    "uint64": "int64 equal",
}
"""Types that have a name of their own where they are compared; the last one is no slip."""


def value(type_name: str, size: int, inner: str = "") -> str:
    """What describes one value; *inner* are the members of its state, if it has one."""
    middle = f"{inner}, " if inner else ""
    return f'"type": {json.dumps(type_name)}, {middle}"size": {size}'


def number(field: p.Field, kind: p.Scalar | p.Gap) -> str:
    """What describes a number or gap that is a field of its own."""
    if field.exact is None:
        return value(kind.type, kind.size)
    return value(_EQUAL.get(kind.type, kind.type) if field.exact else "int32 le", kind.size)


def state_head(plan: p.Plan, version: int) -> str:
    """What describes a state, up to the list of its fields."""
    return f'"vmsd_name": {json.dumps(plan.name)}, "version": {version}, "fields": '


def entry(name: str, described: str) -> str:
    """The entry of a field in the list."""
    return f"{entry_head(name)}{described}}}"


def entry_head(name: str) -> str:
    """The entry of a field up to what describes its value."""
    return f'{{"name": {json.dumps(name)}, '


def together(entries: Iterable[str]) -> str:
    """Several entries as one text; those that are empty describe nothing."""
    return ", ".join(filter(None, entries))


def elements(found: list[str], *, alike: bool) -> list[str]:
    """One text for all elements of an array where they are *alike* and equal, or one for each."""
    if len(found) < 2:
        return found
    # QEMU looks at the declaration only; elements that differ all the same would not be decoded.
    if alike and found.count(found[0]) == len(found):
        return [f'"array_len": {len(found)}, {found[0]}']
    return [f'"index": {index}, {text}' for index, text in enumerate(found)]


def alike(field: p.Field) -> bool:
    """Whether no callback and no subsection may make the elements of an array differ."""
    if field.conditional:
        return False
    kind = field.kind.element if isinstance(field.kind, p.Elements) else field.kind
    if not isinstance(kind, p.Struct):
        return True
    return not kind.plan.subsections and all(map(alike, kind.plan.fields))


def field_names(plan: p.Plan) -> list[str]:
    """The names of the fields, those that occur more than once with their number."""
    total = Counter(field.name for field in plan.fields)
    so_far: Counter[str] = Counter()
    names = []
    for field in plan.fields:
        name = field.name
        names.append(name if total[name] == 1 else f"{name}[{so_far[name]}]")
        so_far[name] += 1
    return names
