"""Device sections with a description that is true of them, made up; and what they are made of.

``fill`` is the model that readers are held against: it walks a description as JSON and writes bytes
in the order that the format's rules give, knowing nothing of how the product reads them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Json = dict[str, Any]

NUMBERS = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "uint8 equal": 1,
    "int16": 2,
    "uint16": 2,
    "uint16 equal": 2,
    "int32": 4,
    "uint32": 4,
    "int32 le": 4,
    "int32 equal": 4,
    "uint32 equal": 4,
    "int64": 8,
    "uint64": 8,
    "int64 equal": 8,
    "timer": 8,
    "CPU_Double_U": 8,
    "float64": 8,
}


def field(name: str, type_name: str, size: int, **more: Any) -> Json:
    """A field of a description."""
    return {"name": name, "type": type_name, "size": size, **more}


def vmsd(name: str, *fields: Json, version: int = 1, subsections: tuple[Json, ...] = ()) -> Json:
    """A state of a description."""
    state: Json = {"vmsd_name": name, "version": version, "fields": list(fields)}
    return state | {"subsections": list(subsections)} if subsections else state


def struct(name: str, inner: Json, **more: Any) -> Json:
    """A field that is a struct."""
    return field(name, "struct", size_of(inner), struct=inner, **more)


def device(name: str, state: Json | int, instance: int = 0) -> Json:
    """A device of a description, with its state or, where it is saved by hand, its size."""
    head = {"name": name, "instance_id": instance}
    if isinstance(state, int):
        return head | {"size": state, "fields": [field("data", "buffer", state)]}
    return head | state


def description(*devices: Json, page_size: int = 4096) -> bytes:
    """The JSON text."""
    return json.dumps({"page_size": page_size, "devices": list(devices)}).encode()


def size_of(state: Json) -> int:
    """Bytes that a state takes."""
    return len(fill(state))


def fill(state: Json, seed: int | random.Random = 0) -> bytes:
    """A body that fits *state*, with values that *seed* determines."""
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)  # noqa: S311
    out = b""
    for entry in state["fields"]:
        for _ in range(entry.get("array_len", 1)):
            inner = entry.get("struct") or (entry if "vmsd_name" in entry else None)
            out += fill(inner, rng) if inner else _value(entry, rng)
    for sub in state.get("subsections", ()):
        name = sub["vmsd_name"].encode()
        out += b"\5" + bytes([len(name)]) + name + sub["version"].to_bytes(4) + fill(sub, rng)
    return out


def _value(entry: Json, rng: random.Random) -> bytes:
    if entry["type"] == "bool":
        return bytes([rng.randrange(2)])
    if entry["type"] == "nullptr" or entry.get("struct") == {}:
        return b"0"
    # Runs of one byte are what bodies are full of, and what timers that are not armed are.
    byte = rng.choice([None, 0, 0xFF])
    return rng.randbytes(entry["size"]) if byte is None else bytes([byte]) * entry["size"]


def section(
    number: int, name: str, body: bytes, *, instance: int = 0, version: int = 1, footer: bool = True
) -> bytes:
    """A device section as on the wire."""
    raw = name.encode()
    head = b"\4" + number.to_bytes(4) + bytes([len(raw)]) + raw
    foot = b"\x7e" + number.to_bytes(4) if footer else b""
    return head + instance.to_bytes(4) + version.to_bytes(4) + body + foot


def tail(devices: bytes, text: bytes) -> bytes:
    """Device sections, the end of the stream, its description."""
    return devices + b"\0\6" + len(text).to_bytes(4) + text


@dataclass(frozen=True)
class Stream:
    """Devices as described, and the bodies that go with them."""

    devices: tuple[Json, ...]
    bodies: tuple[bytes, ...]
    footers: bool

    @property
    def text(self) -> bytes:
        """The description."""
        return description(*self.devices)

    @property
    def sections(self) -> bytes:
        """All device sections."""
        return b"".join(
            section(
                number,
                device["name"],
                body,
                instance=device["instance_id"],
                version=device.get("version", 1),
                footer=self.footers,
            )
            for number, (device, body) in enumerate(zip(self.devices, self.bodies, strict=True))
        )

    @property
    def data(self) -> bytes:
        """Everything."""
        return tail(self.sections, self.text)


_names = st.text("abcxyz_.0[]/é", min_size=1, max_size=6)
_versions = st.sampled_from([0, 1, 7, 20061113, 2**32 - 1])


@st.composite
def _fields(draw: st.DrawFn, depth: int) -> list[Json]:
    """One field, or the elements of an array that are described one by one."""
    name = draw(_names)
    kinds = ["number", "numbers", "bytes", "bitmap", "null", "elements"]
    kind = draw(st.sampled_from(kinds + (["struct", "structs", "inline"] if depth else [])))
    type_name = draw(st.sampled_from(sorted(NUMBERS)))
    number = field(name, type_name, NUMBERS[type_name])
    length = draw(st.integers(1, 4))
    if kind in ("struct", "structs", "inline"):
        return [_compound(kind, name, draw(_states(depth - 1)), length)]
    opaque = draw(st.sampled_from(["buffer", "unused_buffer", "virtio", "pci irq state"]))
    return {
        "number": [number],
        "numbers": [number | {"array_len": length}],
        "elements": [number | {"index": index} for index in range(length)],
        "bytes": [field(name, opaque, 4 * length)],
        "bitmap": [field(name, "bitmap", 8 * length)],
        "null": [field(name, "struct", 1, struct={})],
    }[kind]


def _compound(kind: str, name: str, inner: Json, length: int) -> Json:
    if kind == "inline":
        return field(name, "tmp", size_of(inner)) | inner
    if kind == "structs" and "subsections" not in json.dumps(inner):
        return struct(name, inner, array_len=length)
    return struct(name, inner)


@st.composite
def _states(draw: st.DrawFn, depth: int = 2) -> Json:
    fields = [entry for run in draw(st.lists(_fields(depth), max_size=4)) for entry in run]
    subsections = draw(st.lists(_states(depth - 1), max_size=2)) if depth else []
    return vmsd(draw(_names), *fields, version=draw(_versions), subsections=tuple(subsections))


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Streams of one to four devices."""
    rng = random.Random(draw(st.integers(0, 2**16)))  # noqa: S311
    states = draw(st.lists(st.one_of(_states(), st.integers(0, 9)), min_size=1, max_size=4))
    devices, bodies = [], []
    for instance, state in enumerate(states):
        devices.append(device(draw(_names), state, instance))
        bodies.append(rng.randbytes(state) if isinstance(state, int) else fill(state, rng))
    return Stream(tuple(devices), tuple(bodies), draw(st.booleans()))
