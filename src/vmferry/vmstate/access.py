"""Reading and assigning several attributes at once, by functions that are made for each class.

As dataclasses do: an attribute that is named in a function takes a fraction of the time of one that
is looked up by a name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Get: TypeAlias = Callable[[Any], Sequence[Any]]
Assign: TypeAlias = Callable[[Any, Sequence[Any]], None]


def getter(names: Sequence[str]) -> Get:
    """What returns these attributes of an object; they are identifiers, of a declared class."""
    return _made(f"return ({_listed(names)})")


def assigner(names: Sequence[str]) -> Assign:
    """What assigns as many values to these attributes of an object."""
    if len(names) == 1:
        (name,) = names
        return lambda it, values: setattr(it, name, values[0])
    return _made(f"{_listed(names)} = values" if names else "pass")


def _listed(names: Sequence[str]) -> str:
    return "".join(f"it.{name}, " for name in names)


def _made(body: str) -> Callable[..., Any]:
    names: dict[str, Callable[..., Any]] = {}
    exec(f"def made(it, values=()): {body}", names)  # noqa: S102 - of identifiers alone
    return names["made"]
