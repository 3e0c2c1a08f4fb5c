"""The decoded state of a device as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Final

from vmferry.vmstate.tree import Array, DeviceState, Elements, Node, Raw, Struct, Value
from vmferry.wire.devices import DeviceRegion, DeviceSection

from .output import count, heading, name

_HEX_ROW: Final = 16
_WIDTH: Final = 96
_HERE: Final = "[]"
_DOUBLES: Final = frozenset({"CPU_Double_U", "float64"})


def summary(state: DeviceState) -> str:
    """A device on one line: how much there is, and its first values."""
    nodes = [node for _, node in state.walk()]
    unknown = sum(node.size for node in nodes if isinstance(node, Raw) and node.reason)
    leaves = sum(not isinstance(node, Struct | Elements) for node in nodes)
    if unknown and leaves == 1:
        return f"{count(unknown, 'byte')} not decoded"
    counted = count(leaves, "field")
    if unknown:
        counted += f", {count(unknown, 'byte')} not decoded"
    values = ", ".join(
        f"{name(node.name)}={_short(node)}" for node in nodes if isinstance(node, Value)
    )
    return f"{counted}: {values}" if values else counted


def device(section: DeviceSection | DeviceRegion, state: DeviceState) -> Iterator[str]:
    """Every field of a device."""
    version = f", version {section.version}" if isinstance(section, DeviceSection) else ""
    title = f"{name(state.name)}:{state.instance}{version}"
    yield heading(f"{title}, {count(section.size, 'byte')} at {section.offset:#x}")
    if section.reason:
        yield f"  ({section.reason})"
    for node in state.root.fields:
        yield from _node(node, node.name, "  ")


def _short(value: Value) -> str:
    found = value.value
    if found is None or isinstance(found, bool) or -10 < found < 10 or value.type == "timer":
        return _number(value)
    return f"{found:#x}"


def _number(value: Value) -> str:
    """A value as people read it: numbers above 9 in hexadecimal too."""
    match value.value:
        case None:
            return value.note or "none"
        case bool():
            return "true" if value.value else "false"
        case found if value.type in _DOUBLES:
            return f"{found:#018x}"
        case found if value.type == "timer":
            return f"{found} ns"
        case found:
            return str(found) if -10 < found < 10 else f"{found} ({found:#x})"


def _node(node: Node, label: str, indent: str) -> Iterator[str]:
    title = f"{indent}{name(label)}"
    match node:
        case Value():
            yield f"{title}  {_number(node)}"
        case Array():
            yield f"{title}[{len(node.values)}]  {name(node.type)}"
            yield from _numbers(node, f"{indent}  ")
        case Raw():
            reason = f", not decoded: {node.reason}" if node.reason else ""
            zero = "zero " if node.data and not any(node.data) else ""
            yield f"{title}  {count(len(node.data), f'{zero}byte')}{reason}"
            if not zero:
                yield from _dump(node.data, f"{indent}  ")
        case Elements():
            yield f"{title}[{len(node.items)}]"
            yield from _items(node.items, f"{indent}  ")
        case Struct():
            yield from _struct(node, title, indent)


def _items(items: tuple[Node, ...], indent: str) -> Iterator[str]:
    """The elements of an array; those that are like the one before are named with it."""
    shown = [tuple(_node(item, _HERE, indent)) for item in items]
    first = 0
    for (head, *rest), run in groupby(shown):
        last = first + len(list(run)) - 1
        label = f"[{first}]" if first == last else f"[{first}] to [{last}]"
        yield head.replace(_HERE, label, 1)
        yield from rest
        first = last + 1


def _struct(node: Struct, title: str, indent: str) -> Iterator[str]:
    flat = list(_flat(node, ""))
    line = f"{title}  {', '.join(filter(None, flat))}"
    if node.type != "subsection" and all(flat) and len(line) <= _WIDTH:
        yield line
        return
    kind = "subsection" if node.type == "subsection" else name(node.vmsd)
    yield f"{title}  ({kind}, version {node.version})"
    for child in node.fields:
        yield from _node(child, child.name, f"{indent}  ")


def _flat(node: Struct, prefix: str) -> Iterator[str | None]:
    """The fields of a struct, if they fit on a line; ``None`` for one that does not."""
    for child in node.fields:
        path = f"{prefix}{child.name}"
        if isinstance(child, Value):
            yield f"{name(path)}={_short(child)}"
        elif isinstance(child, Struct) and child.type != "subsection":
            yield from _flat(child, f"{path}.")
        else:
            yield None


def _numbers(node: Array, indent: str) -> Iterator[str]:
    digits = 2 * node.values.itemsize
    plain = all(-10 < found < 10 for found in node.values)
    words = []
    for found, run in groupby(node.values):
        times = len(list(run))
        shown = str(found) if plain or found < 0 else f"{found:#0{digits + 2}x}"
        words += [f"{times}*{shown}"] if times > 3 else [shown] * times
    yield from textwrap.wrap(
        " ".join(words), _WIDTH, initial_indent=indent, subsequent_indent=indent
    )


def _dump(data: bytes, indent: str) -> Iterator[str]:
    """Rows of hexadecimal bytes; a star stands for rows like the one before."""
    before = b""
    starred = False
    for at in range(0, len(data), _HEX_ROW):
        row = data[at : at + _HEX_ROW]
        if row == before and at + _HEX_ROW < len(data):
            if not starred:
                yield f"{indent}*"
            starred = True
            continue
        before, starred = row, False
        yield f"{indent}{at:04x}  {row.hex(' ')}"
