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
from typing import Any, Final, TypeVar

from vmferry.errors import DeclarationError

from .checks import check_depth, check_ends, check_made, may_miss
from .codec import compile_plan
from .kinds import plan_of
from .members import NAME, is_name, members_of, takes
from .plan import (
    PLAN,
    Plan,
    Registration,
)

C = TypeVar("C", bound=type[Any])

_HOOKS: Final = {"pre_save": 0, "post_save": 0, "pre_load": 0, "post_load": 1}
"""The methods that are called if there, and how many arguments they get."""

_PLAIN: Final = (int, float, str, bytes, NoneType)
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
    _check_called(name, "device")
    where = f"device {name}"
    for what, number in (("instance_id", instance_id), ("alias_id", alias_id)):
        if number is not None and not (type(number) is int and 0 <= number <= _VERSION):
            raise DeclarationError(f"{where}: {what} is 0 to {_VERSION}, found {number!r}")
    if type(priority) is not int:
        raise DeclarationError(f"{where}: priority is a number, found {priority!r}")
    if not isinstance(unmigratable, str | None):
        raise DeclarationError(f"{where}: unmigratable is the reason, found {unmigratable!r}")
    registration = Registration(instance_id, alias_id, priority, unmigratable)
    names = _caller_names()
    return lambda cls: _declare(cls, names, name, version, minimum_version, registration)


def state(name: str, *, version: int = 1, minimum_version: int | None = None) -> Callable[[C], C]:
    """Declare the class of a struct, an element or a subsection; versions as in :func:`device`.

    The name of a subsection begins with that of the state it belongs to: ``serial/thr_ipending``.
    """
    _check_called(name, "state")
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


def _check_called(name: Any, decorator: str) -> None:
    if not isinstance(name, str):
        raise DeclarationError(
            f"{getattr(name, '__qualname__', repr(name))}: @{decorator} is called with the name"
            f' that streams have, as in @{decorator}("timer")'
        )


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
    if not isinstance(cls, type):
        raise DeclarationError(f"expected a class to declare, found {cls!r}")
    where = cls.__qualname__
    minimum = version if minimum_version is None else minimum_version
    if not is_name(name):
        raise DeclarationError(f"{where}: a name has 1 to {NAME} printable bytes, found {name!r}")
    numbers = type(minimum) is type(version) is int
    if not numbers or not 0 <= minimum <= version <= _VERSION:
        raise DeclarationError(
            f"{where}: expected 0 <= minimum_version <= version <= {_VERSION},"
            f" found {minimum!r} and {version!r}"
        )
    if _is_frozen(cls):
        raise DeclarationError(f"{where}: it is frozen, so that no state can be loaded into it")
    fields, parts = members_of(cls, names, name, version)
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


def _is_frozen(cls: type[Any]) -> bool:
    """Whether the class lets nobody assign the attributes of its objects."""
    if issubclass(cls, tuple):
        return True
    frozen = getattr(getattr(cls, "__dataclass_params__", None), "frozen", False)
    return frozen or getattr(cls.__setattr__, "__name__", "") == "_frozen_setattrs"


def _hooks(cls: type[Any]) -> frozenset[str]:
    hooks = {name for name in _HOOKS if hasattr(cls, name)}
    for name in hooks:
        method = getattr(cls, name)
        if not callable(method) or not takes(method, 1 + _HOOKS[name]):
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
