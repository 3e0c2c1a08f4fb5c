"""Decoding a device section with the stream's own description.

The encodings are those of QEMU 7.2 ``migration/vmstate-types.c`` and, for the types of PCI devices,
``hw/pci/pci.c``.  Types that are not listed here belong to single devices and are kept as bytes.

The description's sizes were measured, except those of the elements of a compressed array, of which
only the first was.  So where sizes do not add up, everything before the first such array is still
certain; from there to the end of the struct (or of the body) the bytes are kept as they are.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from typing import Final

from vmferry.wire.description import STRUCT, DeviceDescription, FieldDescription, Vmsd

from .tree import Array, DeviceState, Elements, Node, Raw, Struct, Value

# Type: bytes of an element, the code of Python's array.
_NUMBERS: Final = {
    "bool": (1, "B"),
    "int8": (1, "b"),
    "int16": (2, "h"),
    "int32": (4, "i"),
    "int32 equal": (4, "i"),
    "int32 le": (4, "i"),  # "less or equal", a check when loading
    "int64": (8, "q"),
    "int64 equal": (8, "Q"),  # QEMU's name for the check of an unsigned number
    "uint8": (1, "B"),
    "uint8 equal": (1, "B"),
    "uint16": (2, "H"),
    "uint16 equal": (2, "H"),
    "uint32": (4, "I"),
    "uint32 equal": (4, "I"),
    "uint64": (8, "Q"),
    "timer": (8, "q"),
    "CPU_Double_U": (8, "Q"),
    "float64": (8, "Q"),
}
_WORDS: Final = {"bitmap": (8, "Q"), "pci irq state": (4, "I")}
"""Types that are several numbers in one element."""

_BYTES: Final = frozenset({"buffer", "unused_buffer", "pci config", "msix state"})
_INLINE: Final = frozenset({STRUCT, "tmp", "vstruct"})
_LISTS: Final = frozenset({"qtailq", "qlist"})
_EMPTY_LIST: Final = b"\0"
_NULL: Final = b"0"
_NULL_TYPE: Final = "nullptr"

REST: Final = "(rest)"
"""The name of bytes behind the last that could be told apart."""

NODES: Final = 200_000
"""Nodes of one device beyond which arrays of structs stay bytes; QEMU's largest have 5,000."""


def decode_device(
    device: DeviceDescription, body: bytes | memoryview, offset: int = 0
) -> DeviceState:
    """The state in *body*, which begins at *offset* of its channel, as *device* describes it.

    Never raises: what the description does not hold for is a :class:`Raw` with the reason.
    """
    decoder = _Decoder(bytes(body), offset)
    # A device that is saved by hand-written code has no vmsd, and one field of an unknown type.
    vmsd = device.vmsd or Vmsd("", 0, (FieldDescription("data", "", len(body)),))
    root = decoder.struct(device.name, "device", vmsd, 0, len(body))
    return DeviceState(device.name, device.instance, root)


class _Decoder:
    """Decodes one body; positions count from its first byte."""

    def __init__(self, body: bytes, offset: int) -> None:
        self._body = body
        self._offset = offset
        # A field or struct around each byte makes a few nodes; only fields of no bytes make more.
        self._nodes_left = min(NODES, 64 + 8 * len(body))

    def struct(self, name: str, type_name: str, vmsd: Vmsd, start: int, end: int) -> Struct:
        """A struct that fills everything from *start* to *end*."""
        nodes, at, doubt = self._members(vmsd, start, end, exact=vmsd.size == end - start)
        if at < end:
            nodes.append(self._raw(REST, "", at, end, doubt or "more bytes than are described"))
        return self._close(name, type_name, vmsd, start, end, nodes)

    def _close(
        self, name: str, type_name: str, vmsd: Vmsd, start: int, end: int, nodes: list[Node]
    ) -> Struct:
        offset = self._offset + start
        return Struct(name, type_name, offset, end - start, vmsd.name, vmsd.version, tuple(nodes))

    def _members(
        self, vmsd: Vmsd, at: int, end: int, *, exact: bool
    ) -> tuple[list[Node], int, str | None]:
        """Fields and subsections, where they end, and why nothing is certain from there on.

        *exact* says that the sizes add up, so that nothing is uncertain but subsections.
        """
        self._nodes_left -= len(vmsd.fields) + 1
        decoded: list[tuple[FieldDescription, Node]] = []
        doubt = None
        for field in vmsd.fields:
            doubt = None if exact else _doubt(field, end - at)
            if doubt is not None:
                break
            decoded.append((field, self._field(field, at)))
            at += field.wire_size
        nodes = self._gather(decoded)
        for sub in vmsd.subsections if doubt is None else ():
            head = sub.head()
            if not self._body.startswith(head, at, end):
                return nodes, at, f"subsection {sub.name} is described here and does not begin"
            inner, stop, doubt = self._members(sub, at + len(head), end, exact=exact)
            nodes.append(self._close(sub.name, "subsection", sub, at, stop, inner))
            at = stop
            if doubt is not None:
                break
        return nodes, at, doubt

    def _field(self, field: FieldDescription, at: int) -> Node:
        end = at + field.wire_size
        width, code = _NUMBERS.get(field.type) or _WORDS.get(field.type) or (0, "")
        if field.size == 1 and _may_be_null(field, width):
            return self._nulls(field, at, end)
        if field.struct is not None and field.type in _INLINE:
            return self._structs(field, field.struct, at, end)
        if width and field.size == width and field.array_len is None:
            return self._value(field, at, end, signed=code.islower())
        if width and field.size % width == 0:
            return self._array(field, at, end)
        if field.type in _LISTS and self._body[at:end] == _EMPTY_LIST:
            return Elements(field.name, field.type, self._offset + at, 1, ())
        return self._raw(field.name, field.type, at, end, _why_raw(field, width))

    def _value(self, field: FieldDescription, at: int, end: int, *, signed: bool) -> Node:
        number = int.from_bytes(self._body[at:end], signed=signed)
        value: int | bool | None = number
        note = None
        if field.type == "bool":
            if number > 1:
                return self._raw(field.name, field.type, at, end, f"a bool of {number}")
            value = number == 1
        elif field.type == "timer" and number == -1:
            value, note = None, "not armed"
        return Value(field.name, field.type, self._offset + at, end - at, value, note)

    def _array(self, field: FieldDescription, at: int, end: int) -> Array:
        width, code = _NUMBERS.get(field.type) or _WORDS[field.type]
        values = array(code, self._body[at:end])
        if width > 1 and sys.byteorder == "little":
            values.byteswap()
        return Array(field.name, field.type, self._offset + at, end - at, values)

    def _structs(self, field: FieldDescription, struct: Vmsd, at: int, end: int) -> Node:
        if field.array_len is None:
            return self.struct(field.name, field.type, struct, at, end)
        return self._elements(field, at, end, lambda at: self._one(field, struct, at))

    def _one(self, field: FieldDescription, struct: Vmsd, at: int) -> Node:
        return self.struct(field.name, field.type, struct, at, at + field.size)

    def _nulls(self, field: FieldDescription, at: int, end: int) -> Node:
        """Pointers that are NULL, each one byte; an array of them may be a description's lie."""
        if self._body.count(_NULL, at, end) != end - at:
            reason = "described as NULL pointers, which it is not"
            return self._raw(field.name, field.type, at, end, reason)
        if field.array_len is None:
            return self._null(field, at)
        return self._elements(field, at, end, lambda at: self._null(field, at))

    def _null(self, field: FieldDescription, at: int) -> Node:
        return Value(field.name, field.type, self._offset + at, 1, None, "NULL pointer")

    def _elements(
        self, field: FieldDescription, at: int, end: int, one: Callable[[int], Node]
    ) -> Node:
        """An array of nodes: as many as one device may have, the rest in one piece."""
        start = at
        if field.size == 0:
            return self._raw(field.name, field.type, at, end, "elements of no bytes")
        items: list[Node] = []
        while at < end and self._nodes_left > 0:
            self._nodes_left -= 1
            items.append(one(at))
            at += field.size
        if at < end:
            items.append(self._raw(REST, field.type, at, end, "more elements than are decoded"))
        return Elements(field.name, field.type, self._offset + start, end - start, tuple(items))

    def _gather(self, decoded: list[tuple[FieldDescription, Node]]) -> list[Node]:
        """Join the elements of arrays that are described one by one."""
        nodes: list[Node] = []
        run: list[tuple[FieldDescription, Node]] = []
        for field, node in decoded:
            if run and not _same_array(run[-1][0], field):
                nodes.append(self._join(run))
                run = []
            run.append((field, node))
        if run:
            nodes.append(self._join(run))
        return nodes

    def _join(self, run: list[tuple[FieldDescription, Node]]) -> Node:
        field, first = run[0]
        if len(run) == 1:
            return first
        start = first.offset - self._offset
        end = start + sum(field.wire_size for field, _ in run)
        width, _ = _NUMBERS.get(field.type, (0, ""))
        if all(
            isinstance(node, Value) and (other.type, other.size) == (field.type, width)
            for other, node in run
        ):
            return self._array(field, start, end)
        items: list[Node] = []
        for field, node in run:
            # Runs of NULL pointers are arrays within the array (QEMU 10.0).
            whole = isinstance(node, Elements) and field.array_len is not None
            items += node.items if isinstance(node, Elements) and whole else (node,)
        return Elements(first.name, first.type, first.offset, end - start, tuple(items))

    def _raw(self, name: str, type_name: str, at: int, end: int, reason: str | None) -> Raw:
        data = self._body[at:end]
        return Raw(name, type_name, self._offset + at, end - at, data, reason)


def _doubt(field: FieldDescription, left: int) -> str | None:
    """Why *field* cannot be where sizes do not add up and *left* bytes are left."""
    if field.array_len is not None:
        return f"the sizes described do not add up, and from array {field.name} on any may be wrong"
    if field.wire_size > left:
        return f"{field.name} is described with {field.wire_size} bytes, more than there are"
    return None


def _may_be_null(field: FieldDescription, width: int) -> bool:
    """Whether the single byte of *field* must stand for a pointer that is NULL."""
    return field.type == _NULL_TYPE or width > 1 or (field.type == STRUCT and field.struct is None)


def _same_array(last: FieldDescription, field: FieldDescription) -> bool:
    # Fields of one name are told apart by a suffix, so a name that comes again is the next element.
    # QEMU 10.0 gives an index to the first of several elements only.
    return field.name == last.name and field.index != 0


def _why_raw(field: FieldDescription, width: int) -> str | None:
    if field.type in _BYTES:
        return None
    if not field.type:
        return "nothing is known of it but its size"
    if width:
        return f"{field.type} of {field.size} bytes"
    if field.type == STRUCT:
        return "a struct without description"
    if field.type in _LISTS:
        return "a list, whose elements are not described one by one"
    return "a type of its own device, whose layout is not described"
