"""Where in a device one of its states is: for errors that come up once everything is assigned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .plan import PLAN, Plan, plans_of


def path_to(obj: Any, wanted: Any) -> str:
    """The path from *obj* to the state *wanted* in it; empty where it is *obj*, or not there."""
    for path, inner in _inside(obj):
        if inner is wanted:
            return path
        if below := path_to(inner, wanted):
            return f"{path}.{below}"
    return ""


def _inside(obj: Any) -> Iterator[tuple[str, Any]]:
    plan = type(obj).__dict__.get(PLAN)
    if not isinstance(plan, Plan):
        return
    names = [field.attribute for field in plan.fields if plans_of(field.kind)]
    names += [part.attribute for part in plan.subsections]
    for name in names:
        yield from _states(getattr(obj, name, None), name)


def _states(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    match value:
        case list():
            for index, item in enumerate(value):
                yield from _states(item, f"{path}[{index}]")
        case dict():
            for key, item in value.items():
                yield from _states(item, f"{path}[{key!r}]")
        case _:
            yield path, value
