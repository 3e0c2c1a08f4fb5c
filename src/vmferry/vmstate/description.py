"""What a declared object's bytes are made of, in the schemas of QEMU's own JSON.

:func:`describe` is about the bytes of one object, as ``migration/vmstate.c`` of QEMU 7.2 describes
them at the end of a stream: lengths, conditions and subsections are those of this object.
:func:`declared` is about the class, as ``-dump-vmstate`` writes it.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from types import UnionType
from typing import Any, Final, TypeAlias

from vmferry.errors import StateError

from . import plan as p
from .arrays import flattened, with_path
from .codec import needed_part
from .declare import vmstate_of
from .staging import begin_saving, run_hook
from .transfer import plan_of_object
from .values import check_class, shown

Json: TypeAlias = dict[str, Any]

_EQUAL: Final = {
    "uint8": "uint8 equal",
    "uint16": "uint16 equal",
    "int32": "int32 equal",
    "uint32": "uint32 equal",
    "uint64": "int64 equal",
}
"""Types that have a name of their own where they are compared; the last one is no slip."""

_MARK: Final = 1
_SUBSECTION_HEAD: Final = 6
_NULL: Final[Json] = {"type": "nullptr", "size": 1}


def describe(obj: object) -> Json:
    """The description of the bytes that :func:`save` makes of *obj*: ``vmsd_name`` and so on.

    Raises :class:`StateError` where saving would.
    """
    plan = plan_of_object(obj)
    try:
        with ExitStack() as after:
            return _state(plan, plan.version, obj, after)[0]
    except StateError as error:
        raise error.inside(plan.name) from error.__cause__


def _state(plan: p.Plan, version: int, obj: Any, after: ExitStack) -> tuple[Json, int]:
    """The description of one object, and its bytes."""
    begin_saving(plan, obj, after)
    names = field_names(plan)
    entries: list[Json] = []
    size = 0
    for field, name in zip(plan.fields, names, strict=True):
        if field.in_version(version) and (field.when is None or field.when(obj, version)):
            try:
                found, taken = _field(field, obj, after)
            except StateError as error:
                raise error.inside(field.attribute) from error.__cause__
            entries += [{"name": name} | entry for entry in found]
            size += taken
    state: Json = {"vmsd_name": plan.name, "version": version, "fields": entries}
    subsections: list[Json] = []
    for part in plan.subsections:
        value = needed_part(part, obj)
        if value is not None:
            inner, taken = _state(part.plan, part.plan.version, value, after)
            subsections.append(inner)
            size += _SUBSECTION_HEAD + len(part.plan.name.encode()) + taken
    if subsections:
        state["subsections"] = subsections
    return state, size


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


def _field(field: p.Field, obj: Any, after: ExitStack) -> tuple[list[Json], int]:
    kind = field.kind
    if isinstance(kind, p.Temporary):
        value = run_hook(kind.save, getattr(obj, kind.save))
    else:
        value = getattr(obj, field.attribute, None)
    if isinstance(kind, p.Elements):
        return _elements(field, kind, value, obj, after)
    entry, size = _value(kind, value, after)
    if isinstance(kind, p.Scalar) and field.exact is not None:
        entry["type"] = _EQUAL.get(kind.type, kind.type) if field.exact else "int32 le"
    return [entry], size


def _elements(
    field: p.Field, kind: p.Elements, value: Any, obj: Any, after: ExitStack
) -> tuple[list[Json], int]:
    """One entry for all elements where they are alike, or one for each."""
    items = flattened(kind, value, obj)
    element = kind.element
    if isinstance(element, p.Scalar) and not kind.nullable:
        entry = {"type": element.type, "size": element.size}
        if len(items) > 1 and not field.conditional:
            return [{"array_len": len(items)} | entry], len(items) * element.size
        found = [dict(entry) for _ in items]
        size = len(items) * element.size
    else:
        found, size = [], 0
        for index, item in enumerate(items):
            if item is None and kind.nullable:
                entry, taken = dict(_NULL), _MARK
            else:
                entry, taken = with_path(kind, index, _value, element, item, after)
            found.append(entry)
            size += taken
    if len(found) < 2:
        return found, size
    # QEMU looks at the declaration only; elements that differ all the same would not be decoded.
    if _compressible(field) and all(entry == found[0] for entry in found):
        return [{"array_len": len(found)} | found[0]], size
    return [{"index": index} | entry for index, entry in enumerate(found)], size


def _compressible(field: p.Field) -> bool:
    """Whether no callback and no subsection may make the elements of an array differ."""
    if field.conditional:
        return False
    kind = field.kind.element if isinstance(field.kind, p.Elements) else field.kind
    if not isinstance(kind, p.Struct):
        return True
    return not kind.plan.subsections and all(map(_compressible, kind.plan.fields))


def _value(kind: p.Kind, value: Any, after: ExitStack) -> tuple[Json, int]:
    """The entry of one value, without a name, and its bytes."""
    inner: Json = {}
    match kind:
        case p.Struct(plan, version):
            check_class(value, plan)
            state, size = _state(plan, version, value, after)
            inner = {"struct": state} if kind.type == "struct" else state
        case p.Temporary(plan):
            check_class(value, plan)
            inner, size = _state(plan, plan.version, value, after)
        case p.Queue(plan):
            _check_type(value, list)
            inner, size = _linked([(plan, item) for item in value], after)
            size += _MARK + _MARK * len(value)
        case p.Tree():
            _check_type(value, dict)
            nodes = [
                pair
                for key, item in value.items()
                for pair in ([(kind.key, key)] if kind.key else []) + [(kind.value, item)]
            ]
            inner, size = _linked(nodes, after)
            size += 4 + _MARK + len(value) * (_MARK + (0 if kind.key else 8))
        case p.Bytes(count=None):
            size = kind.size
        case p.Bytes():
            _check_type(value, bytes | bytearray | memoryview)
            size = len(value)
        case p.Custom(codec):
            size = len(run_hook(codec.type, codec.save, value))
        case _:
            size = p.fixed_size(kind)
    return {"type": kind.type} | inner | {"size": size}, size


def _check_type(value: Any, types: type[Any] | UnionType) -> None:
    if not isinstance(value, types):
        raise StateError("what is declared", shown(value))


def _linked(states: list[tuple[p.Plan, Any]], after: ExitStack) -> tuple[Json, int]:
    """The keys that stay of those that each state of a list puts into the same object."""
    inner: Json = {}
    size = 0
    for plan, item in states:
        check_class(item, plan)
        inner, taken = _state(plan, plan.version, item, after)
        size += taken
    return inner, size


# The class


def declared(cls: type[Any]) -> Json:
    """What *cls* declares, as ``-dump-vmstate`` has it.

    ``Name``, ``version_id``, ``minimum_version_id`` and ``Description``.  Where QEMU gives the size
    of a member of its C struct, this is the bytes of one element on the wire, 0 if they vary.
    Keys that QEMU has not: ``type``; ``num_field``, the field that holds the length, of which
    ``num`` is the bound then; ``before``, the version from which on a field is gone, where nothing
    else decides; ``struct_version_id``, the version that a state is written in, if not in its own.
    """
    plan = vmstate_of(cls)
    return {
        "Name": plan.name,
        "version_id": plan.version,
        "minimum_version_id": plan.minimum_version,
        "Description": _declared_state(plan),
    }


def _declared_state(plan: p.Plan) -> Json:
    state: Json = {
        "name": plan.name,
        "version_id": plan.version,
        "minimum_version_id": plan.minimum_version,
    }
    if plan.fields:
        state["Fields"] = [_declared_field(field) for field in plan.fields]
    if plan.subsections:
        state["Subsections"] = [_declared_state(part.plan) for part in plan.subsections]
    return state


def _declared_field(field: p.Field) -> Json:
    kind = field.kind
    element = kind.element if isinstance(kind, p.Elements) else kind
    entry: Json = {
        "field": field.name,
        "version_id": field.since,
        "field_exists": field.conditional,
        "size": p.fixed_size(element),
        "type": kind.type,
    }
    if isinstance(kind, p.Elements):
        entry["num"] = p.product(kind.shape) if kind.count is None else kind.bound
        if kind.count is not None:
            entry["num_field"] = kind.count
    if field.before and field.when is None:
        entry["before"] = field.before
    if isinstance(element, p.Struct) and element.type == "vstruct":
        entry["struct_version_id"] = element.version
    inner = getattr(element, "plan", None) or getattr(element, "value", None)
    if isinstance(inner, p.Plan):
        entry["Description"] = _declared_state(inner)
    return entry
