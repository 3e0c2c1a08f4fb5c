"""From the annotations of a class to its fields and subsections, each checked by itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from keyword import iskeyword
from typing import Any, ClassVar, Final, get_args, get_origin

from vmferry.errors import DeclarationError

from . import types as t
from .hints import hints_of, is_left_alone, split
from .kinds import kind_of, plan_of
from .plan import Field, Gap, Part, Scalar, Struct, Temporary

NAME: Final = 255
"""Bytes of a name at the most."""


def members_of(
    cls: type[Any], names: dict[str, Any], name: str, version: int
) -> tuple[tuple[Field, ...], tuple[Part, ...]]:
    """The fields of *cls* and its subsections; *names* are those of where it is made.

    *name* and *version* are those that the state is declared with.
    """
    hints = hints_of(cls, names)
    fields: list[Field] = []
    parts: list[Part] = []
    for attribute, hint in hints.items():
        where = f"{cls.__qualname__}.{attribute}"
        if not attribute.isidentifier() or iskeyword(attribute):
            raise DeclarationError(f"{where}: no name that an attribute can have")
        member = _member(attribute, hint, where)
        if isinstance(member, Field):
            if isinstance(member.kind, Temporary):
                _check_method(cls, member.kind.save, 1, where)
                _check_method(cls, member.kind.load, 2, where)
            _check_field(cls, member, {f.attribute: f for f in fields}, hints, version, where)
            fields.append(member)
        elif member is not None:
            _check_part(cls, member, name, {part.plan.name for part in parts}, where)
            parts.append(member)
    return tuple(fields), tuple(parts)


def _member(attribute: str, hint: Any, where: str) -> Field | Part | None:
    if is_left_alone(hint, where):
        return None
    class_variable = get_origin(hint) is ClassVar
    spelled = split(get_args(hint)[0] if class_variable else hint, where)
    if isinstance(spelled.kind, t.Subsection):
        if class_variable or spelled.conditions:
            raise DeclarationError(f"{where}: a subsection is an attribute, without conditions")
        return _part(attribute, spelled.type, spelled.kind, where)
    kind = kind_of(spelled, where)
    field = Field(attribute, attribute, kind)
    found: set[type[Any]] = set()
    changes: dict[str, Any] = {}
    for condition in spelled.conditions:
        if type(condition) in found:
            raise DeclarationError(f"{where}: two conditions of the same sort")
        found.add(type(condition))
        changes |= _condition(condition, kind, where)
    hidden = isinstance(kind, Gap | Temporary)
    if hidden and "name" not in changes:
        changes["name"] = "unused" if isinstance(kind, Gap) else "tmp"
    if class_variable != (hidden or t.Of in found):
        raise DeclarationError(
            f"{where}: ClassVar[Annotated[...]] is for Gap, Temporary and of(), and only for them"
        )
    if t.Of in found and "name" not in changes:
        changes["name"] = changes["attribute"]
    settings = {key: getattr(field, key) for key in Field.__slots__} | changes
    return Field(**settings)


def _condition(condition: Any, kind: Any, where: str) -> dict[str, Any]:  # noqa: PLR0911
    """The settings of a field that *condition* stands for."""
    match condition:
        case t.Since(version):
            return {"since": version}
        case t.Before(version):
            return {"before": version}
        case t.When(test):
            return {"when": _two_arguments(test, where)}
        case t.Named(name):
            return {"name": name}
        case t.Of(attribute):
            return {"attribute": attribute}
        case t.Check(exact):
            if not isinstance(kind, Scalar) or kind.code not in "bhiqBHIQ" or kind.type == "timer":
                raise DeclarationError(f"{where}: equal and at_most are for integers")
            if not exact and kind.code != "i":
                raise DeclarationError(f"{where}: at_most is for I32")
            return {"exact": exact}
        case t.AtVersion(version):
            if not isinstance(kind, Struct):
                raise DeclarationError(f"{where}: at_version is for structs")
            if not kind.plan.minimum_version <= version <= kind.plan.version:
                raise DeclarationError(
                    f"{where}: {kind.plan.cls.__qualname__} has versions"
                    f" {kind.plan.minimum_version} to {kind.plan.version}, found {version}"
                )
            return {"kind": Struct(kind.plan, version, "vstruct")}
    raise DeclarationError(f"{where}: {condition!r} is not known")


def _two_arguments(test: Callable[..., bool], where: str) -> Callable[[Any, int], bool]:
    if takes(test, 2):
        return test
    if takes(test, 1):
        return lambda owner, _version: test(owner)
    raise DeclarationError(f"{where}: the test of when() takes the device, or it and the version")


def _check_method(cls: type[Any], name: str, arguments: int, where: str) -> None:
    method = getattr(cls, name, None)
    if not callable(method) or not takes(method, arguments):
        more = " and the temporary" if arguments > 1 else ""
        raise DeclarationError(f"{where}: {name} is a method of self{more}; found {method!r}")


def _check_field(
    cls: type[Any],
    field: Field,
    before: dict[str, Field],
    hints: dict[str, Any],
    version: int,
    where: str,
) -> None:
    if not 0 <= field.since <= version:
        raise DeclarationError(f"{where}: since({field.since}) in a class of version {version}")
    if not (0 <= field.before <= version and (not field.before or field.since < field.before)):
        raise DeclarationError(
            f"{where}: before({field.before}) in a class of version {version}, since {field.since}"
        )
    if not is_name(field.name):
        raise DeclarationError(f"{where}: a field's name has 1 to {NAME} printable bytes")
    if isinstance(getattr(cls, field.attribute, None), list | dict | bytearray):
        raise DeclarationError(
            f"{where}: its value in the class is shared by all objects; make one in __init__"
        )
    if field.attribute not in hints:
        raise DeclarationError(f"{where}: of({field.attribute!r}) names no attribute of the class")
    if not isinstance(field.kind, Gap | Temporary) and not _can_be_set(cls, field.attribute):
        raise DeclarationError(f"{where}: objects of the class have no such attribute to set")
    kind = field.kind
    count = getattr(kind, "count", None)
    if count is not None:
        counter = before.get(count)
        if counter is None:
            raise DeclarationError(f"{where}: the count {count!r} is no field declared before it")
        if not isinstance(counter.kind, Scalar) or counter.kind.code not in "BHIi":
            raise DeclarationError(f"{where}: the count {count!r} is not a U8, U16, U32 or I32")


def _can_be_set(cls: type[Any], attribute: str) -> bool:
    """Whether objects of *cls* may have the attribute: that is up to ``__slots__``, if it has."""
    found = inspect.getattr_static(cls, attribute, None)
    if isinstance(found, property):
        return found.fset is not None
    return bool(cls.__dictoffset__) or hasattr(found, "__set__")


def _part(attribute: str, hint: Any, spec: t.Subsection, where: str) -> Part:
    inner, optional = split(hint, where).optional
    plan = plan_of(inner)
    if plan is None:
        raise DeclarationError(f"{where}: a subsection is of a class declared with @state")
    if optional != (spec.needed is None):
        raise DeclarationError(
            f"{where}: a subsection is either X | None, or Subsection(needed=...) of X"
        )
    if spec.needed is not None and not takes(spec.needed, 1):
        raise DeclarationError(f"{where}: needed takes the device")
    return Part(attribute, plan, spec.needed)


def _check_part(cls: type[Any], part: Part, owner: str, others: set[str], where: str) -> None:
    name = part.plan.name
    if not _can_be_set(cls, part.attribute):
        raise DeclarationError(f"{where}: objects of the class have no such attribute to set")
    if name in others:
        raise DeclarationError(f"{where}: a second subsection called {name!r}")
    # A loader takes what follows the fields for a subsection by this alone.
    if not name.startswith(owner) or name == owner:
        raise DeclarationError(
            f"{where}: the name of a subsection begins with {owner!r}, found {name!r}"
        )


def is_name(name: Any) -> bool:
    """Whether streams may have the name."""
    return isinstance(name, str) and 1 <= len(name.encode()) <= NAME and name.isprintable()


def takes(function: Callable[..., Any], arguments: int) -> bool:
    """Whether *function* may be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True
