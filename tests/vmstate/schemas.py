"""Declared state, made by hand and made up."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from vmferry.vmstate.schema import DeviceSchema, FieldSchema, Schema, StateSchema, parse_schema

Json = dict[str, Any]


def field(name: str, size: int = 1, version: int = 0, *, maybe: bool = False, **more: Any) -> Json:
    """A field as QEMU dumps it; *more* are ``num`` and ``Description``."""
    of_all = {"field": name, "version_id": version, "field_exists": maybe, "size": size}
    return of_all | more


def state(
    name: str,
    *fields: Json,
    version: int = 1,
    minimum: int = 1,
    subsections: list[Json] | None = None,
) -> Json:
    """A description as QEMU dumps it: keys of what there is none of are left out."""
    found: Json = {"name": name, "version_id": version, "minimum_version_id": minimum}
    if fields:
        found["Fields"] = list(fields)
    if subsections:
        found["Subsections"] = subsections
    return found


def dump(*states: Json, **typed: Json) -> Json:
    """A dump of devices, whose types are called as their states or as the keywords say."""
    devices = {one["name"]: one for one in states} | typed
    return {"vmschkmachine": {"Name": "none"}} | {
        name: {
            "Name": name,
            "version_id": one["version_id"],
            "minimum_version_id": one["minimum_version_id"],
            "Description": one,
        }
        for name, one in devices.items()
    }


def schema(*states: Json, **typed: Json) -> Schema:
    """As read from such a dump."""
    return parse_schema(json.dumps(dump(*states, **typed)).encode())


NAMES = st.sampled_from(["a", "b", "c", "d", "unused"])
VERSIONS = st.integers(0, 3)


def _fields(structs: st.SearchStrategy[StateSchema]) -> st.SearchStrategy[FieldSchema]:
    return st.builds(
        FieldSchema,
        NAMES,
        st.sampled_from([0, 1, 2, 4, 8]),
        VERSIONS,
        st.booleans(),
        st.none() | st.integers(1, 3),
        st.none() | structs,
    )


def _states(inner: st.SearchStrategy[StateSchema]) -> st.SearchStrategy[StateSchema]:
    return st.builds(
        StateSchema,
        NAMES,
        VERSIONS,
        st.just(0),
        st.lists(_fields(inner), max_size=5).map(tuple),
        st.lists(inner, max_size=2, unique_by=lambda sub: sub.name).map(tuple),
    )


STATES = st.recursive(st.builds(StateSchema, NAMES, VERSIONS), _states, max_leaves=6)

SCHEMAS = st.builds(
    Schema,
    st.lists(
        st.builds(DeviceSchema, st.sampled_from(["x", "y", "z"]), STATES),
        max_size=3,
        unique_by=lambda device: device.type,
    ).map(tuple),
)
