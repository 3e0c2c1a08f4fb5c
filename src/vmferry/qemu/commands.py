"""Commands of a QMP server: what they are called with, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from vmferry.errors import UsageError, printable
from vmferry.qemu.messages import Object

_NAMES: Final[Mapping[type, str]] = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    list: "an array",
    dict: "an object",
}


class CommandError(UsageError):
    """An error answer of another class than ``GenericError``, such as ``CommandNotFound``."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    *run* gets the arguments, and returns what is sent under ``return``, or ``None`` for an empty
    object; what it raises is the answer too.  It is called in a thread of its own, one command at a
    time, unless it runs *at_once*.  Arguments have the types in *required* and *optional*; with
    *more* any others are left for *run* to judge.
    """

    run: Callable[[Object], object]
    required: Mapping[str, type] = field(default_factory=dict)
    optional: Mapping[str, type] = field(default_factory=dict)
    more: bool = False
    at_once: bool = False

    def check(self, arguments: Object) -> None:
        """Raise UsageError unless the *arguments* are those of the command."""
        known = {**self.required, **self.optional}
        for name, value in arguments.items():
            if name in known:
                # Exactly: true is no number.
                if type(value) is not known[name]:
                    raise UsageError(f"expected {_NAMES[known[name]]} as {name}")
            elif not self.more:
                raise UsageError(f"there is no argument {printable(name)}")
        for name in self.required:
            if name not in arguments:
                raise UsageError(f"expected an argument {name}, found none")
