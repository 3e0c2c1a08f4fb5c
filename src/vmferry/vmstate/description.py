"""What a class declares, in the schema of QEMU's ``-dump-vmstate``."""

from __future__ import annotations

from typing import Any, TypeAlias

from . import plan as p
from .declare import vmstate_of

Json: TypeAlias = dict[str, Any]


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
