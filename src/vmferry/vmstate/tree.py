"""The tree of values that a device section is decoded to.

Five kinds of nodes.  :class:`Value` is one number, truth value or NULL pointer, :class:`Array` many
numbers of one type, :class:`Raw` bytes that are kept as they came, :class:`Elements` an array of
nodes, :class:`Struct` named fields and subsections.  Names are QEMU's C expressions, as the
stream's description gives them, so they may hold dots and brackets themselves.

Every node knows its offset and size in bytes; offsets count from where the decoder was told that
the body begins.  Put in order, the leaves and the heads of subsections are the body, byte for byte.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from vmferry.errors import UsageError, printable


@dataclass(frozen=True, slots=True)
class Value:
    """One value: a truth value for type ``bool``, else a number, or ``None``.

    ``None`` is a timer that is not armed (a timer is armed for a time in nanoseconds of its clock),
    or a pointer that is NULL; ``note`` says which.  A number of type ``CPU_Double_U`` or
    ``float64`` is the 64 bits of a double.
    """

    kind: ClassVar[str] = "value"

    name: str
    type: str
    offset: int
    size: int
    value: int | bool | None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """``value``, and ``note`` if there is one."""
        shown = _common(self) | {"value": self.value}
        return shown if self.note is None else shown | {"note": self.note}


@dataclass(frozen=True, slots=True)
class Array:
    """Numbers of one type, in one ``array`` of *n* elements, not to be changed.

    Elements of type ``bool`` are 0 or 1, or what else stood there; those of type ``timer`` are -1
    where not armed.  A ``bitmap`` is an array of 64-bit words: bit *i* is bit *i* % 64 of word
    *i* // 64.
    """

    kind: ClassVar[str] = "array"

    name: str
    type: str
    offset: int
    size: int
    values: array[int]

    def to_json(self) -> dict[str, Any]:
        """``values``, a list of numbers."""
        return _common(self) | {"values": self.values.tolist()}


@dataclass(frozen=True, slots=True)
class Raw:
    """Bytes as they came.

    ``reason`` says why they are not decoded; it is ``None`` for types that are nothing but bytes.
    """

    kind: ClassVar[str] = "raw"

    name: str
    type: str
    offset: int
    size: int
    data: bytes
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """``hex``, two digits a byte, and ``reason`` if there is one."""
        shown = _common(self) | {"hex": self.data.hex()}
        return shown if self.reason is None else shown | {"reason": self.reason}


@dataclass(frozen=True, slots=True)
class Elements:
    """An array whose elements are nodes."""

    kind: ClassVar[str] = "elements"

    name: str
    type: str
    offset: int
    size: int
    items: tuple[Node, ...]

    def to_json(self) -> dict[str, Any]:
        """``items``, a list of nodes."""
        return _common(self) | {"items": [item.to_json() for item in self.items]}


@dataclass(frozen=True, slots=True)
class Struct:
    """Fields, then subsections, in the order of the stream.

    ``vmsd`` and ``version`` are those of its description.  A subsection is a struct of type
    ``subsection``, named as its ``vmsd``; its ``offset`` and ``size`` include its head.
    """

    kind: ClassVar[str] = "struct"

    name: str
    type: str
    offset: int
    size: int
    vmsd: str
    version: int
    fields: tuple[Node, ...]

    def to_json(self) -> dict[str, Any]:
        """``vmsd``, ``version`` and ``fields``, a list of nodes."""
        fields = [node.to_json() for node in self.fields]
        return _common(self) | {"vmsd": self.vmsd, "version": self.version, "fields": fields}


Node: TypeAlias = Value | Array | Raw | Elements | Struct


def _common(node: Node) -> dict[str, Any]:
    return {
        "kind": node.kind,
        "name": node.name,
        "type": node.type,
        "offset": node.offset,
        "size": node.size,
    }


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The state of one device: its name and instance, and the tree of its values."""

    name: str
    instance: int
    root: Struct

    def get(self, path: str) -> Node | None:
        """The node at *path*, or ``None``; the first one where a name occurs twice.

        A path is made of names and, for elements of arrays, indexes, as in ``env.fpregs[3].tmp``;
        a subsection goes by its name.  :meth:`walk` gives the paths there are.
        """
        return _find(self.root, path)

    def __getitem__(self, path: str) -> Node:
        node = self.get(path)
        if node is None:
            raise UsageError(f"device {printable(self.name)} has no field {printable(path)}")
        return node

    def walk(self) -> Iterator[tuple[str, Node]]:
        """Path and node of every node below the root, parents first, in the order of the stream."""
        for child in _children(self.root):
            yield from _walk(child.name, child)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``: ``name``, ``instance`` and ``state``, a node.

        A node is an object with ``kind`` (the node's class in lower case), ``name``, ``type``,
        ``offset``, ``size``, and what :meth:`to_json` of its class adds.  Numbers have up to 64
        bits, more than JSON readers that know only doubles can tell apart.
        """
        return {"name": self.name, "instance": self.instance, "state": self.root.to_json()}


def _children(node: Node) -> tuple[Node, ...]:
    match node:
        case Struct():
            return node.fields
        case Elements():
            return node.items
        case _:
            return ()


def _walk(path: str, node: Node) -> Iterator[tuple[str, Node]]:
    yield path, node
    for index, child in enumerate(_children(node)):
        inner = f"{path}[{index}]" if isinstance(node, Elements) else f"{path}.{child.name}"
        yield from _walk(inner, child)


def _find(struct: Struct, path: str) -> Node | None:
    # Names hold dots and brackets, so each field that fits is tried, whole names before indexes.
    for child in struct.fields:
        if not path.startswith(child.name):
            continue
        found = _descend(child, path[len(child.name) :])
        if found is not None:
            return found
    return None


def _descend(node: Node, rest: str) -> Node | None:
    """The node that *rest* of a path leads to from *node*."""
    if not rest:
        return node
    if isinstance(node, Struct) and rest.startswith("."):
        return _find(node, rest[1:])
    if isinstance(node, Elements) and rest.startswith("["):
        index, closed, rest = rest[1:].partition("]")
        if closed and index.isdecimal() and int(index) < len(node.items):
            return _descend(node.items[int(index)], rest)
    return None
