"""The configuration section: the machine's type, and what both sides must agree on.

QEMU 7.2 ``migration/savevm.c`` (``vmstate_configuration``).  A type byte, the name with a 32-bit
length, then up to three subsections in this order, each without footer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from vmferry.errors import LimitExceeded, printable

from . import limits
from .buffer import Cursor, Parse, decode_name, encode_name, within
from .layout import Kind

_PAGE_BITS: Final = "configuration/target-page-bits"
_CAPABILITIES: Final = "configuration/capabilities"
_UUID: Final = "configuration/uuid"


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the source says of itself before anything else.

    ``page_bits`` is sent only where a target has more bits than its architecture's minimum (QEMU
    2.8), ``capabilities`` are those that both sides must share (QEMU 4.0), ``uuid`` is sent under
    ``validate-uuid`` (QEMU 4.2).
    """

    machine: str
    page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: UUID | None = None

    def encode(self) -> bytes:
        """The section as on the wire."""
        name = self.machine.encode("utf-8")
        out = [bytes([Kind.CONFIGURATION]), len(name).to_bytes(4), name]
        if self.page_bits is not None:
            out += [_subsection(_PAGE_BITS), self.page_bits.to_bytes(4)]
        if self.capabilities:
            out += [_subsection(_CAPABILITIES), len(self.capabilities).to_bytes(4)]
            out += [encode_name(name) for name in self.capabilities]
        if self.uuid is not None:
            out += [_subsection(_UUID), self.uuid.bytes]
        return b"".join(out)


def _subsection(name: str) -> bytes:
    return bytes([Kind.SUBSECTION]) + encode_name(name) + (1).to_bytes(4)


def parse_configuration(at: Cursor) -> Parse[Configuration]:
    """Read the section; the cursor stands on its type byte."""
    return (yield from within(_configuration(at), section="configuration"))


def _configuration(at: Cursor) -> Parse[Configuration]:
    at.buffer.advance(1)
    offset = at.buffer.offset
    size = yield from at.number(4, "the length of the machine type")
    if size > limits.CONFIG_NAME:
        raise LimitExceeded(
            f"a machine type of at most {limits.CONFIG_NAME} bytes", str(size), offset=offset
        )
    raw = yield from at.take(size, "the machine type")
    machine = decode_name(raw, "the machine type", offset)
    found: dict[str, Any] = {}
    while (yield from at.peek_number(1, "a section type")) == Kind.SUBSECTION:
        name = yield from _subsection_name(at, list(found))
        found[name] = yield from _SUBSECTIONS[name](at)
    return Configuration(
        machine, found.get(_PAGE_BITS), found.get(_CAPABILITIES, ()), found.get(_UUID)
    )


def _subsection_name(at: Cursor, before: list[str]) -> Parse[str]:
    offset = at.buffer.offset
    at.buffer.advance(1)
    name = yield from at.name("the name of a subsection")
    order = list(_SUBSECTIONS)
    allowed = order[order.index(before[-1]) + 1 :] if before else order
    if name not in allowed:
        expected = " or ".join(map(printable, allowed)) or "no further subsection"
        raise at.fail(expected, printable(name), offset=offset)
    version = yield from at.number(4, "the version of a subsection")
    if version != 1:
        raise at.fail(f"version 1 of {name}", str(version), offset=offset)
    return name


def _page_bits(at: Cursor) -> Parse[int]:
    offset = at.buffer.offset
    bits = yield from at.number(4, "the page bits")
    if not 10 <= bits <= 16:
        raise at.fail(
            "10 to 16 bits of page offset (pages of 1 to 64 KiB)", str(bits), offset=offset
        )
    return bits


def _capabilities(at: Cursor) -> Parse[tuple[str, ...]]:
    offset = at.buffer.offset
    count = yield from at.number(4, "the number of capabilities")
    if not 1 <= count <= limits.CAPABILITIES:
        raise LimitExceeded(f"1 to {limits.CAPABILITIES} capabilities", str(count), offset=offset)
    names = []
    for _ in range(count):
        offset = at.buffer.offset
        name = yield from at.name("a capability")
        if name in names:
            raise at.fail("each capability once", printable(name), offset=offset)
        names.append(name)
    return tuple(names)


def _uuid(at: Cursor) -> Parse[UUID]:
    return UUID(bytes=(yield from at.take(16, "the UUID")))


# In the order in which they are sent.
_SUBSECTIONS: Final[dict[str, Callable[[Cursor], Parse[Any]]]] = {
    _PAGE_BITS: _page_bits,
    _CAPABILITIES: _capabilities,
    _UUID: _uuid,
}
