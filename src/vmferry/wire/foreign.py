"""Iterable sections of other architectures that say where they end; kept as they came.

QEMU 7.2 ``hw/s390x/s390-stattrib.c`` and ``hw/ppc/spapr.c``.  Their pieces are read for their
lengths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmferry.errors import LimitExceeded

from .buffer import Cursor, Parse

_PIECE: Final = 16 << 20

S390_ATTRIBUTES: Final = "s390-storage_attributes"
SPAPR_HTAB: Final = "spapr/htab"


@dataclass(frozen=True, slots=True)
class ForeignPiece:
    """A piece of a section's body that is not interpreted."""

    data: bytes

    def encode(self) -> bytes:
        """The piece as on the wire."""
        return self.data


def storage_attributes(at: Cursor) -> Parse[None]:
    """A body of `s390-storage_attributes`: words of address and flag, some with data."""
    while True:
        word = yield from at.peek_number(8, "a record of storage attributes")
        match word & 0xFFF:
            case 0x02:
                yield from at.need(16, "a record of storage attributes")
                count = int.from_bytes(at.buffer.peek(16)[8:])
                yield (yield from _piece(at, 16, count))
            case 0x01 | 0x08 as flag:
                yield (yield from _piece(at, 8, 0))
                if flag == 0x01:
                    return
            case _:
                raise at.fail(
                    "a record of storage attributes: more, done or end", f"the word {word:#018x}"
                )


def hash_table_start(at: Cursor) -> Parse[None]:
    """The first body of `spapr/htab`: the size of the table."""
    yield (yield from _piece(at, 4, 0))


def hash_table(at: Cursor) -> Parse[None]:
    """A later body of `spapr/htab`: runs of valid and invalid entries of 16 bytes."""
    no_table = (yield from at.peek_number(4, "a part of the hash table")) == 0xFFFFFFFF
    yield (yield from _piece(at, 4, 0))
    while not no_table:
        yield from at.need(8, "a run of the hash table")
        head = bytes(at.buffer.peek(8))
        yield (yield from _piece(at, 8, 16 * int.from_bytes(head[4:6])))
        if head == bytes(8):
            return


def _piece(at: Cursor, head: int, size: int) -> Parse[ForeignPiece]:
    if size > _PIECE:
        raise LimitExceeded(f"at most {_PIECE} bytes", str(size), offset=at.buffer.offset)
    return ForeignPiece((yield from at.take(head + size, "a piece of a section")))
