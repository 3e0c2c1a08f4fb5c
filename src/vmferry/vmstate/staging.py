"""What is collected while a state is saved or loaded, before anything is final.

Saving gathers parts that are joined once; loading gathers assignments that are made once everything
has decoded, so that a state that does not fit leaves its objects as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any, TypeAlias, TypeVar

from vmferry.errors import StateError

from .access import Assign
from .plan import Plan

R = TypeVar("R")

Hook: TypeAlias = Callable[[], None]


@dataclass(slots=True)
class Saver:
    """The bytes of a state, part by part, and the ``post_save`` that are due, the last one first.

    Parts may be views of the state itself, so nothing may change until they are joined.
    """

    parts: list[bytes | bytearray | memoryview] = field(default_factory=list)
    after: ExitStack = field(default_factory=ExitStack)

    def size(self, since: int) -> int:
        """Bytes of the parts from the index *since* on."""
        return sum(map(len, self.parts[since:]))


@dataclass(slots=True)
class Loader:
    """Where decoding is, and what is to be done when it has come through.

    An entry of ``commits`` is a function, and the object, list or buffer and the values that it is
    to be called with; one of ``after`` the object that a hook belongs to, and the hook.
    ``recording`` says that a predicate may ask for any field.
    """

    data: memoryview
    at: int
    recording: bool = False
    commits: list[tuple[Assign, Any, Sequence[Any]]] = field(default_factory=list)
    after: list[tuple[Any, Hook]] = field(default_factory=list)

    def take(self, size: int) -> int:
        """Pass *size* bytes, and say where they begin."""
        at = self.at
        if size > len(self.data) - at:
            wanted = f"{size} byte{'s' * (size != 1)}"
            raise StateError(wanted, f"{len(self.data) - at}, and the end of the state")
        self.at = at + size
        return at

    def commit(self) -> None:
        """Make the assignments."""
        for assign, target, values in self.commits:
            assign(target, values)


@dataclass(slots=True)
class Frame:
    """One object that is being loaded.

    ``seen`` are its fields so far; numbers only where ``recording`` says that they are asked for.
    """

    obj: Any
    cls: type[Any]
    recording: bool
    seen: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str) -> Any:
        """The attribute as it will be."""
        return self.seen[name] if name in self.seen else getattr(self.obj, name)


class View:
    """An object as it will be once loaded, for predicates: what is decoded hides what is there."""

    __slots__ = ("_frame",)

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def __getattr__(self, name: str) -> Any:
        frame = self._frame
        if name in frame.seen:
            return frame.seen[name]
        found = inspect.getattr_static(frame.cls, name, None)
        if isinstance(found, FunctionType):
            return MethodType(found, self)
        if isinstance(found, property) and found.fget is not None:
            return found.fget(self)
        if found is None or hasattr(found, "__get__"):
            return getattr(frame.obj, name)
        # An object that is not made yet does not know the constants of its class.
        return getattr(frame.obj, name, found)


@dataclass(frozen=True, slots=True)
class Kept:
    """A value that is not to be assigned, as its assignments are staged; and how it will look."""

    seen: Any


def replace(items: list[Any], values: Sequence[Any]) -> None:
    """Assign all of a list."""
    items[:] = values


def begin_saving(plan: Plan, obj: Any, after: ExitStack) -> None:
    """Run ``pre_save``, and leave ``post_save`` to *after*, also where ``pre_save`` fails."""
    name = plan.cls.__qualname__
    if "post_save" in plan.hooks:
        after.callback(run_hook, f"{name}.post_save", obj.post_save)
    if "pre_save" in plan.hooks:
        run_hook(f"{name}.pre_save", obj.pre_save)


class Blank:
    """Collects the attributes of an object that can only be made with some of them."""

    def __init__(self, defaults: dict[str, Any]) -> None:
        vars(self).update(defaults)


def run_hook(name: str, function: Callable[..., R], *arguments: Any) -> R:
    """Call what belongs to the device; a ``ValueError`` is its way to say no."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise StateError(f"a state that {name} accepts", str(error) or "a refusal") from error
