"""What may be wrong with a declared class as a whole, though each of its fields is right."""

from __future__ import annotations

from typing import Final

from vmferry.errors import DeclarationError
from vmferry.wire.limits import JSON_DEPTH

from .plan import Custom, Elements, Field, Gap, Plan, Struct, Temporary, depth_inside, plans_of

_AROUND: Final = 5
"""Brackets around what describes a field: those of its list, its device, and around devices."""


def may_miss(field: Field) -> bool:
    """Whether a stream may be without the field."""
    return field.conditional or field.since > 0 or isinstance(field.kind, Gap | Temporary)


def check_made(plan: Plan) -> None:
    """Refuse fields whose objects have to be made when loading, of classes that cannot be."""
    made = [(part.attribute, part.plan) for part in plan.subsections if part.needed is None]
    for field in plan.fields:
        kind = field.kind
        in_place = isinstance(kind, Struct) or (isinstance(kind, Elements) and kind.count is None)
        made += [(field.attribute, inner) for inner in plans_of(kind) if not in_place]
    for attribute, inner in made:
        if inner.required is None:
            raise DeclarationError(
                f"{plan.cls.__qualname__}.{attribute}: a {inner.cls.__qualname__} has to be made"
                " when loading, so that what it takes to be called may only be fields that are"
                " always there"
            )


def check_depth(plan: Plan) -> None:
    """Refuse states that are nested deeper than what describes them may be."""
    depths = [(field.attribute, depth_inside(field.kind)) for field in plan.fields]
    depths += [(part.attribute, part.plan.depth) for part in plan.subsections]
    for attribute, depth in depths:
        if _AROUND + depth > JSON_DEPTH:
            raise DeclarationError(
                f"{plan.cls.__qualname__}.{attribute}: states inside each other, so deep that their"
                f" description would have more than {JSON_DEPTH} brackets open at once"
            )


def check_ends(plan: Plan) -> None:
    """Refuse subsections that a loader would take for those of the state before them.

    Whose a subsection is shows in the beginning of its name alone, and the innermost state that
    ends where it begins is asked first.
    """
    ends = _ends(plan.fields)
    ends += [inner for part in plan.subsections for inner in (part.plan, *_ends(part.plan.fields))]
    for part in plan.subsections:
        for inner in ends:
            if inner.subsections and part.plan.name.startswith(inner.name) and inner != part.plan:
                raise DeclarationError(
                    f"{plan.cls.__qualname__}.{part.attribute}: the name {part.plan.name!r} begins"
                    f" with {inner.name!r}, so that a {inner.cls.__qualname__} before it would take"
                    " it for a subsection of its own; use another name"
                )


def _ends(fields: tuple[Field, ...]) -> list[Plan]:
    """The states that may be the last of some fields, innermost included."""
    found: list[Plan] = []
    for field in reversed(fields):
        kind = field.kind.element if isinstance(field.kind, Elements) else field.kind
        if isinstance(kind, Struct | Temporary):
            found += [kind.plan, *_ends(kind.plan.fields)]
        if not _may_be_empty(field):
            break
    return found


def _may_be_empty(field: Field) -> bool:
    """Whether the field may have no bytes."""
    kind = field.kind.element if isinstance(field.kind, Elements) else field.kind
    if isinstance(kind, Struct | Temporary):
        return field.conditional or field.since > 0 or all(map(_may_be_empty, kind.plan.fields))
    counted = getattr(field.kind, "count", None) is not None
    return field.conditional or field.since > 0 or counted or isinstance(kind, Custom)
