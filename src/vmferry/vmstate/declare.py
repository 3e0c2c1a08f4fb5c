"""From an annotated class to its plan: every declaration is checked here, when the class is made.

``@device`` marks the state of a device section, ``@state`` that of a struct or subsection inside
one.  They go above ``@dataclass`` or ``@define``, which may replace the class.  Fields are sent in
the order of the annotations, those of base classes first; every annotation has to say how it is
sent, or that it is not (``Local``).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import NoneType
from typing import Any, ClassVar, Final, TypeVar, get_args, get_origin, get_type_hints

from vmferry.errors import DeclarationError

from . import types as t
from .checks import check_depth, check_ends, check_made, may_miss
from .codec import compile_plan
from .kinds import kind_of, plan_of, split
from .plan import (
    PLAN,
    Field,
    Gap,
    Part,
    Plan,
    Registration,
    Scalar,
    Struct,
    Temporary,
)

C = TypeVar("C", bound=type[Any])

_HOOKS: Final = {"pre_save": 0, "post_save": 0, "pre_load": 0, "post_load": 1}
"""The methods that are called if there, and how many arguments they get."""

_PLAIN: Final = (int, float, str, bytes, NoneType)
_NAME: Final = 255
_VERSION: Final = 0xFFFFFFFF


def device(
    name: str,
    *,
    version: int = 1,
    minimum_version: int | None = None,
    instance_id: int | None = None,
    alias_id: int | None = None,
    priority: int = 0,
    unmigratable: str | None = None,
) -> Callable[[C], C]:
    """Declare the class of a device whose section is called *name*.

    Streams from *minimum_version* (that is *version*, if not given) to *version* load.
    *instance_id* is given out by the registry where it is ``None``; streams that call the device
    *alias_id* load too.  Devices of a higher *priority* are saved and loaded first.  A device that
    is *unmigratable* refuses to be saved, with that as the reason.
    """
    for what, number in (("instance_id", instance_id), ("alias_id", alias_id)):
        if number is not None and not 0 <= number <= _VERSION:
            raise DeclarationError(f"device {name}: {what} is 0 to {_VERSION}, found {number}")
    registration = Registration(instance_id, alias_id, priority, unmigratable)
    names = _caller_names()
    return lambda cls: _declare(cls, names, name, version, minimum_version, registration)


def state(name: str, *, version: int = 1, minimum_version: int | None = None) -> Callable[[C], C]:
    """Declare the class of a struct, an element or a subsection; versions as in :func:`device`.

    The name of a subsection begins with that of the state it belongs to: ``serial/thr_ipending``.
    """
    names = _caller_names()
    return lambda cls: _declare(cls, names, name, version, minimum_version, None)


def vmstate_of(declared: object) -> Plan:
    """The plan of a declared class, or of an object of one."""
    cls = declared if isinstance(declared, type) else type(declared)
    plan = plan_of(cls)
    if plan is None:
        raise DeclarationError(
            f"{cls.__qualname__} is not declared; put @device or @state above it,"
            " and above @dataclass or @define"
        )
    return plan


def _caller_names() -> dict[str, Any]:
    """Names that annotations in the caller may use, for classes that are made in a function."""
    return dict(sys._getframe(2).f_locals)  # noqa: SLF001 - as inspect.currentframe does


def _declare(
    cls: C,
    names: dict[str, Any],
    name: str,
    version: int,
    minimum_version: int | None,
    registration: Registration | None,
) -> C:
    where = cls.__qualname__
    minimum = version if minimum_version is None else minimum_version
    if not 1 <= len(name.encode()) <= _NAME or not name.isprintable():
        raise DeclarationError(f"{where}: a name has 1 to {_NAME} printable bytes, found {name!r}")
    if not 0 <= minimum <= version <= _VERSION:
        raise DeclarationError(
            f"{where}: expected 0 <= minimum_version <= version <= {_VERSION},"
            f" found {minimum} and {version}"
        )
    if getattr(getattr(cls, "__dataclass_params__", None), "frozen", False):
        raise DeclarationError(f"{where}: it is frozen, so that no state can be loaded into it")
    fields, parts = _members(cls, names, name, version)
    plan = Plan(
        cls=cls,
        name=name,
        version=version,
        minimum_version=minimum,
        fields=fields,
        subsections=parts,
        hooks=_hooks(cls),
        required=_required(cls, {f.attribute for f in fields if not may_miss(f)}),
        defaults={p.name: p.default for p in _parameters(cls) if isinstance(p.default, _PLAIN)},
        registration=registration,
    )
    check_made(plan)
    check_depth(plan)
    check_ends(plan)
    compile_plan(plan, version)
    setattr(cls, PLAN, plan)
    return cls


def _members(
    cls: type[Any], names: dict[str, Any], name: str, version: int
) -> tuple[tuple[Field, ...], tuple[Part, ...]]:
    hints = _hints(cls, names)
    fields: list[Field] = []
    parts: list[Part] = []
    for attribute, hint in hints.items():
        where = f"{cls.__qualname__}.{attribute}"
        member = _member(attribute, hint, where)
        if isinstance(member, Field):
            if isinstance(member.kind, Temporary):
                _check_method(cls, member.kind.save, 1, where)
                _check_method(cls, member.kind.load, 2, where)
            _check_field(cls, member, {f.attribute: f for f in fields}, hints, version, where)
            fields.append(member)
        elif member is not None:
            _check_part(member, name, where)
            parts.append(member)
    return tuple(fields), tuple(parts)


def _hints(cls: type[Any], names: dict[str, Any]) -> dict[str, Any]:
    """The annotations of the class and its bases, each read where it was written."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        annotations = inspect.get_annotations(base)
        alone = type("alone", (), {"__annotations__": annotations, "__module__": base.__module__})
        near = base.__module__ == cls.__module__
        known = names | {cls.__name__: cls} if near else {}
        try:
            hints |= get_type_hints(alone, localns=known, include_extras=True)
        except (NameError, TypeError, AttributeError, SyntaxError) as error:
            raise DeclarationError(
                f"{cls.__qualname__}: an annotation of {base.__qualname__} cannot be read: {error}"
            ) from error
    return hints


def _member(attribute: str, hint: Any, where: str) -> Field | Part | None:
    class_variable = get_origin(hint) is ClassVar
    if hint is ClassVar:
        return None
    spelled = split(get_args(hint)[0] if class_variable else hint, where)
    if spelled.local or (class_variable and spelled.kind is None and not spelled.conditions):
        return None
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
    if _takes(test, 2):
        return test
    if _takes(test, 1):
        return lambda owner, _version: test(owner)
    raise DeclarationError(f"{where}: the test of when() takes the device, or it and the version")


def _check_method(cls: type[Any], name: str, arguments: int, where: str) -> None:
    method = getattr(cls, name, None)
    if not callable(method) or not _takes(method, arguments):
        more = " and the temporary" if arguments > 1 else ""
        raise DeclarationError(f"{where}: {name} is a method of self{more}; found {method!r}")


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError):
        return False
    return True


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
    if not field.name.isprintable() or len(field.name.encode()) > _NAME:
        raise DeclarationError(f"{where}: a field's name has at most {_NAME} printable bytes")
    if isinstance(getattr(cls, field.attribute, None), list | dict | bytearray):
        raise DeclarationError(
            f"{where}: its value in the class is shared by all objects; make one in __init__"
        )
    if field.attribute not in hints:
        raise DeclarationError(f"{where}: of({field.attribute!r}) names no attribute of the class")
    kind = field.kind
    count = getattr(kind, "count", None)
    if count is not None:
        counter = before.get(count)
        if counter is None:
            raise DeclarationError(f"{where}: the count {count!r} is no field declared before it")
        if not isinstance(counter.kind, Scalar) or counter.kind.code not in "BHIi":
            raise DeclarationError(f"{where}: the count {count!r} is not a U8, U16, U32 or I32")


def _part(attribute: str, hint: Any, spec: t.Subsection, where: str) -> Part:
    inner, optional = split(hint, where).optional
    plan = plan_of(inner)
    if plan is None:
        raise DeclarationError(f"{where}: a subsection is of a class declared with @state")
    if optional != (spec.needed is None):
        raise DeclarationError(
            f"{where}: a subsection is either X | None, or Subsection(needed=...) of X"
        )
    if spec.needed is not None and not _takes(spec.needed, 1):
        raise DeclarationError(f"{where}: needed takes the device")
    return Part(attribute, plan, spec.needed)


def _check_part(part: Part, owner: str, where: str) -> None:
    name = part.plan.name
    # A loader takes what follows the fields for a subsection by this alone.
    if not name.startswith(owner) or name == owner:
        raise DeclarationError(
            f"{where}: the name of a subsection begins with {owner!r}, found {name!r}"
        )


def _hooks(cls: type[Any]) -> frozenset[str]:
    hooks = {name for name in _HOOKS if hasattr(cls, name)}
    for name in hooks:
        method = getattr(cls, name)
        if not callable(method) or not _takes(method, 1 + _HOOKS[name]):
            more = " and the version" if _HOOKS[name] else ""
            raise DeclarationError(f"{cls.__qualname__}.{name}: a method of self{more}")
    return frozenset(hooks)


def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(cls).parameters.values())
    except (TypeError, ValueError):
        return []


def _required(cls: type[Any], certain: set[str]) -> tuple[str, ...] | None:
    """The arguments that *cls* cannot be called without, if they are all *certain* fields."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in _parameters(cls) if p.default is p.empty and p.kind not in many]
    names = tuple(p.name for p in required)
    by_name = all(p.kind is not p.POSITIONAL_ONLY for p in required)
    return names if by_name and certain.issuperset(names) else None
