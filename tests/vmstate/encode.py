"""The bytes that a tree of values stands for: the inverse of decoding, written on its own."""

from __future__ import annotations

from vmferry.vmstate.tree import Array, Elements, Node, Raw, Struct, Value


def encode(node: Node) -> bytes:
    """What *node* was decoded from."""
    match node:
        case Struct():
            return _head(node) + b"".join(map(encode, node.fields))
        case Elements(items=()):
            return bytes(node.size)  # the end marker of an empty list
        case Elements():
            return b"".join(map(encode, node.items))
        case Raw():
            return node.data
        case Array():
            width = node.values.itemsize
            return b"".join(_number(value, width) for value in node.values)
        case Value():
            none = ord("0") if node.note == "NULL pointer" else -1
            return _number(none if node.value is None else node.value, node.size)


def _number(value: int, size: int) -> bytes:
    return (value & (1 << 8 * size) - 1).to_bytes(size)


def _head(node: Struct) -> bytes:
    if node.type != "subsection":
        return b""
    name = node.vmsd.encode()
    return b"\5" + bytes([len(name)]) + name + node.version.to_bytes(4)
