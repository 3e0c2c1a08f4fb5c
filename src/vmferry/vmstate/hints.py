"""Reading the annotations of a class, and taking one of them apart."""

from __future__ import annotations

import inspect
from dataclasses import KW_ONLY, InitVar, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Final, Union, get_args, get_origin, get_type_hints

from vmferry.errors import DeclarationError

from . import types as t

_KINDS: Final = (
    t.Integer,
    t.Double,
    t.Expiry,
    t.Buffer,
    t.VarBuffer,
    t.Array,
    t.VarArray,
    t.Queue,
    t.Tree,
    t.Bitmap,
    t.Gap,
    t.Temporary,
    t.Custom,
    t.Subsection,
)
_CONDITIONS: Final = (t.Since, t.Before, t.When, t.Named, t.Of, t.AtVersion, t.Check)
_ARGUMENTS: Final[dict[Any, tuple[type[Any], ...]]] = {
    "int": (int,),
    "int | None": (int, NoneType),
    "str": (str,),
    "bool": (bool,),
}
"""The arguments of kinds and conditions, as :mod:`.types` writes their types."""


def hints_of(cls: type[Any], names: dict[str, Any]) -> dict[str, Any]:
    """The annotations of the class and its bases, each read where it was written.

    *names* are those that may be used where the class is made.  What stands among the annotations
    without being an attribute (``KW_ONLY``, ``InitVar``) is left out.
    """
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        near = base.__module__ == cls.__module__
        known = names | {cls.__name__: cls} if near else {}
        for attribute, annotation in inspect.get_annotations(base).items():
            hint = _read(base, annotation, known, f"{cls.__qualname__}.{attribute}")
            if hint is not KW_ONLY and not isinstance(hint, InitVar):
                hints[attribute] = hint
    return hints


def _read(base: type[Any], annotation: Any, known: dict[str, Any], where: str) -> Any:
    """One annotation of *base*, as a type."""
    alone = type(
        "alone", (), {"__annotations__": {"it": annotation}, "__module__": base.__module__}
    )
    names = dict(known)
    undefined: NameError | None = None
    while True:
        try:
            hint = get_type_hints(alone, localns=names, include_extras=True)["it"]
        except NameError as error:
            if error.name is None or error.name in names:
                raise _unreadable(where, error) from error
            undefined = undefined or error
            names[error.name] = _Undefined
        except (TypeError, AttributeError, SyntaxError, ValueError) as error:
            raise _unreadable(where, undefined or error) from error
        else:
            break
    # What is imported for type checkers only may stand in Local[...], which nothing looks at.
    if undefined is not None and not is_left_alone(hint, where):
        raise _unreadable(where, undefined) from undefined
    return hint


def _unreadable(where: str, error: Exception) -> DeclarationError:
    return DeclarationError(f"{where}: its annotation cannot be read: {error}")


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


class _Undefined(metaclass=_Anything):
    """Stands for names that are not known."""


def is_left_alone(hint: Any, where: str) -> bool:
    """Whether an annotation is of nothing that is migrated."""
    if hint is ClassVar:
        return True
    class_variable = get_origin(hint) is ClassVar
    spelled = split(get_args(hint)[0] if class_variable else hint, where)
    return spelled.local or (class_variable and spelled.kind is None and not spelled.conditions)


@dataclass(frozen=True, slots=True)
class Spelled:
    """An annotation taken apart: the type, the kind if one is given, and conditions."""

    type: Any
    kind: Any
    conditions: tuple[Any, ...]
    local: bool

    @property
    def optional(self) -> tuple[Any, bool]:
        """The type without ``None``, and whether it had one."""
        if get_origin(self.type) not in (Union, UnionType):
            return self.type, False
        others = [arg for arg in get_args(self.type) if arg is not NoneType]
        return (others[0] if len(others) == 1 else self.type), len(others) == 1


def split(hint: Any, where: str) -> Spelled:
    """Take *hint* apart."""
    if get_origin(hint) is not Annotated:
        return Spelled(hint, None, (), local=False)
    inner, *metadata = get_args(hint)
    for item in metadata:
        if isinstance(item, type) and item in (*_KINDS, *_CONDITIONS):
            raise DeclarationError(f"{where}: {item.__name__} lacks its arguments")
        if get_origin(item) is Annotated:
            raise DeclarationError(f"{where}: it has two types; use the one that is meant alone")
    kinds = [item for item in metadata if isinstance(item, _KINDS)]
    if len(kinds) > 1:
        raise DeclarationError(f"{where}: two kinds, {kinds[0]!r} and {kinds[1]!r}")
    conditions = tuple(item for item in metadata if isinstance(item, _CONDITIONS))
    for item in (*kinds, *conditions):
        _check_arguments(item, where)
    local = any(isinstance(item, t.NotMigrated) for item in metadata)
    if local and (kinds or conditions):
        raise DeclarationError(f"{where}: an attribute is local, or it is migrated")
    return Spelled(inner, kinds[0] if kinds else None, conditions, local)


def _check_arguments(item: Any, where: str) -> None:
    for argument in fields(item) if is_dataclass(item) else ():
        value = getattr(item, argument.name)
        if type(value) not in _ARGUMENTS.get(argument.type, (type(value),)):
            raise DeclarationError(
                f"{where}: {type(item).__name__}: {argument.name} is of type {argument.type};"
                f" found {value!r}"
            )
