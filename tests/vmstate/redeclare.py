"""Classes made of QEMU's own descriptions: every device of a stream, declared."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated, Any, ClassVar

from tests.vmstate.devices import Raw
from vmferry.vmstate import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    Buffer,
    Custom,
    Gap,
    Temporary,
    Timer,
    at_most,
    at_version,
    device,
    equal,
    named,
    state,
    subsection,
    when,
)

NUMBERS: dict[str, Any] = {
    "bool": bool,
    "int8": I8,
    "int16": I16,
    "int32": I32,
    "int64": I64,
    "uint8": U8,
    "uint16": U16,
    "uint32": U32,
    "uint64": U64,
    "timer": Timer,
    "int32 le": Annotated[I32, at_most],
    "uint8 equal": Annotated[U8, equal],
    "uint16 equal": Annotated[U16, equal],
    "int32 equal": Annotated[I32, equal],
    "uint32 equal": Annotated[U32, equal],
    "int64 equal": Annotated[U64, equal],
}

always = when(lambda _: True)
"""What makes QEMU describe the elements of an array one by one."""


def declare(described: dict[str, Any]) -> type[Any]:
    """The class of a device."""
    return device(described["vmsd_name"], version=described["version"])(plain(described))


def plain(described: dict[str, Any]) -> type[Any]:
    """A class without attributes of its own; what it is loaded with is all that it has."""
    cls: type[Any] = type("Plain", (), {})
    hints: dict[str, Any] = {}
    for entries in runs(described["fields"]):
        name = f"f{len(hints)}"
        hints[name] = field(cls, name, entries)
    for part in described.get("subsections", ()):
        inner = declare_state(part)
        hints[f"f{len(hints)}"] = Annotated[inner | None, subsection]
    cls.__annotations__ = hints
    return cls


def declare_state(described: dict[str, Any]) -> type[Any]:
    return state(described["vmsd_name"], version=described["version"])(plain(described))


def runs(fields: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The fields; elements of one array together."""

    def array(entry: dict[str, Any]) -> Any:
        return entry["name"] if "index" in entry else id(entry)

    return [list(entries) for _, entries in groupby(fields, key=array)]


def joined(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """One element that stands for all, with the subsections of all of them."""
    if not entries[0].get("struct"):
        return entries[0]
    structs = [entry["struct"] for entry in entries]
    parts = {part["vmsd_name"]: part for inner in structs for part in inner.get("subsections", ())}
    return entries[0] | {"struct": structs[0] | {"subsections": list(parts.values())}}


def field(cls: type[Any], name: str, entries: list[dict[str, Any]]) -> Any:
    """The annotation of a field, or of an array that is described one by one."""
    entry = entries[0]
    if entry["type"] == "unused_buffer":
        return ClassVar[Annotated[None, Gap(entry["size"]), named(entry["name"])]]
    if entry["type"] == "tmp":
        # The temporary is kept, to be saved again.
        setattr(cls, f"make_{name}", lambda self: getattr(self, f"kept_{name}"))
        setattr(cls, f"take_{name}", lambda self, value: setattr(self, f"kept_{name}", value))
        methods = Temporary(f"make_{name}", f"take_{name}")
        return ClassVar[Annotated[declare_state(entry), methods, named(entry["name"])]]
    element = value(joined(entries))
    if "index" in entry:
        return Annotated[list[element], Array(len(entries)), always, named(entry["name"])]
    if "array_len" in entry:
        return Annotated[list[element], Array(entry["array_len"]), named(entry["name"])]
    return Annotated[element, named(entry["name"])]


def value(entry: dict[str, Any]) -> Any:
    """The annotation of one element."""
    kind, size = entry["type"], entry["size"]
    if entry.get("struct"):
        return declare_state(entry["struct"])
    if kind == "vstruct":
        return Annotated[declare_state(entry), at_version(entry["version"])]
    if kind in NUMBERS and size > (kind not in {"bool", "int8", "uint8", "uint8 equal"}):
        return NUMBERS[kind]
    if kind == "buffer" and size > 0:
        return Annotated[bytes, Buffer(size)]
    if kind == "bitmap":
        return Annotated[int, Bitmap(8 * size)]
    return Annotated[bytes, Custom(Raw(kind, size))]


def without_inline(described: Any) -> Any:
    """A description without what hand-written types put into it of their own."""
    if isinstance(described, list):
        return [without_inline(item) for item in described]
    if not isinstance(described, dict):
        return described
    inline = "type" in described and described["type"] not in {"tmp", "vstruct"}
    left = {"vmsd_name", "version", "fields", "subsections"} if inline else set()
    if described.get("struct") == {}:
        left |= {"struct"}
    return {key: without_inline(item) for key, item in described.items() if key not in left}
