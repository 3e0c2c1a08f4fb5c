"""Both forms of the kernels, and what the tests of either build their input with."""

from __future__ import annotations

import numpy as np
import pytest

from vmferry.pages import COMPRESS, CONTINUE, PAGE, ROW, XBZRLE, ZERO, _plain

try:
    from vmferry.pages import _compiled
except ModuleNotFoundError:
    _compiled = None

TWINS = [
    pytest.param(_plain, id="plain"),
    pytest.param(
        _compiled, id="compiled", marks=pytest.mark.skipif(not _compiled, reason="not compiled")
    ),
]
both = pytest.mark.parametrize("kernels", TWINS)
needs_compiled = pytest.mark.skipif(not _compiled, reason="the kernels are not compiled")
compiled, plain = _compiled, _plain

PAGE_SIZES = (1024, 4096, 8192, 16384, 65536)


def rows_from(*rows):
    """A table of (word, position, length)."""
    table = np.zeros(len(rows), ROW)
    for index, (word, position, length) in enumerate(rows):
        table[index] = (word, position, length, 0)
    return table


def record(kind, offset, payload, name=None):
    """A page record as on the wire; *name* (length byte first) or, without, CONTINUE."""
    word = offset | kind | (CONTINUE if name is None else 0)
    head = word.to_bytes(8) + (name or b"")
    match kind:
        case 0x040:
            head += b"\1" + len(payload).to_bytes(2)
        case 0x100:
            head += len(payload).to_bytes(4)
    return head + payload


__all__ = [
    "COMPRESS",
    "CONTINUE",
    "PAGE",
    "PAGE_SIZES",
    "XBZRLE",
    "ZERO",
    "both",
    "compiled",
    "needs_compiled",
    "plain",
    "record",
    "rows_from",
]
