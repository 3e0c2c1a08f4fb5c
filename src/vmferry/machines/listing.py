"""A listing assembler: hex bytes with labels, as a disassembler prints them, turned into an image.

A line is ``label:``, or machine code in hex followed by ``; what it does``.  In place of bytes a
line may hold ``{name.kind}``: the value of a label or of a parameter, where *kind* is

====  =====================================================
q     64 bits, little-endian
d     32 bits, little-endian
w     16 bits, little-endian
b     8 bits
r     8 bits, the distance from the next byte to the label
R     32 bits, the distance from the next byte to the label
====  =====================================================
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_TOKEN = re.compile(r"([0-9a-f]{2})|\{(\w+)\.([qdwbrR])\}")
_WIDTH = {"q": 8, "d": 4, "w": 2, "b": 1, "r": 1, "R": 4}


def assemble(listing: str, *, origin: int, parameters: Mapping[str, int]) -> bytes:
    """The bytes of *listing*, to be loaded at the address *origin*.

    Raises ``ValueError`` for what is no machine code, ``KeyError`` for a name that is neither a
    label nor a parameter, and ``OverflowError`` for a label that is too far away.
    """
    tokens = list(_tokens(listing))
    symbols = dict(parameters)
    address = origin
    for label, _, kind in tokens:
        if kind == ":":
            symbols[label] = address
        address += _WIDTH.get(kind, 0 if kind == ":" else 1)
    image = bytearray()
    for name, byte, kind in tokens:
        if kind == "byte":
            image.append(byte)
        elif kind != ":":
            width = _WIDTH[kind]
            value = symbols[name]
            if kind in "rR":
                value -= origin + len(image) + width
                image += value.to_bytes(width, "little", signed=True)
            else:
                image += (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    return bytes(image)


def _tokens(listing: str) -> Iterator[tuple[str, int, str]]:
    """(name, byte, kind) for each label, byte and reference, in order."""
    for line in listing.splitlines():
        code = line.partition(";")[0].strip()
        if code.endswith(":"):
            yield code[:-1], 0, ":"
            continue
        for word in code.split():
            match = _TOKEN.fullmatch(word)
            if match is None:
                raise ValueError(f"expected a hex byte or {{name.kind}}, found {word!r}")
            byte, name, kind = match.groups()
            yield (name, 0, kind) if name else ("", int(byte, 16), "byte")
