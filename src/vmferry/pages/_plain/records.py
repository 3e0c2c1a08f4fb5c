"""Records as on the wire, found and written.  Layout: QEMU 7.2 ``migration/ram.c``."""

from __future__ import annotations

from vmferry.pages.rows import COMPRESS, CONTINUE, KINDS, XBZRLE, ZERO, Rows, compress_bound

from .types import Bytes, Room


def scan_records(
    data: Bytes, start: int, stop: int, page_size: int, block_size: int, name: bytes, rows: Rows
) -> tuple[int, int]:
    """Fill *rows* with the page records of one RAM block that stand whole in ``data[start:stop]``.

    *name* is the block's name as on the wire, length byte first.  Stops before the first record
    that is incomplete, names another block, is no page record or breaks a rule; what is wrong with
    it is for the caller to find out.  Returns the position of that record and the rows filled.
    """
    at, count = start, 0
    while count < len(rows):
        record = _record(data, at, stop, page_size, name)
        if record is None:
            break
        word, position, length = record
        offset = word & -page_size
        if block_size < page_size or offset > block_size - page_size:
            break
        rows[count] = (word, position, length, 0)
        count += 1
        at = position + length
    return at, count


def _record(
    data: Bytes, at: int, stop: int, page_size: int, name: bytes
) -> tuple[int, int, int] | None:
    if stop - at < 9:
        return None
    word = int.from_bytes(data[at : at + 8])
    flags = word & (page_size - 1)
    at += 8
    if not flags & CONTINUE:
        if bytes(data[at : min(at + len(name), stop)]) != name:
            return None
        at += len(name)
    head = bytes(data[at : min(at + 4, stop)])
    match flags & ~CONTINUE:
        case 0x008:
            length = page_size
        case 0x002 if head[:1] == b"\0":
            length = 1
        case 0x040 if len(head) >= 3 and head[0] == 1:
            at, length = at + 3, int.from_bytes(head[1:3])
            if length > page_size:
                return None
        case 0x100 if len(head) == 4:
            at, length = at + 4, int.from_bytes(head)
            if length > compress_bound(page_size):
                return None
        case _:
            return None
    return (word, at, length) if length <= stop - at else None


def pack_records(
    rows: Rows, first: int, data: Bytes, page_size: int, name: bytes, out: Room
) -> tuple[int, int]:
    """Write the records of ``rows[first:]`` into *out* as far as they fit.

    *name* is written in each record without the CONTINUE flag.  Returns the first row not written
    and the bytes written.
    """
    at = 0
    for index in range(first, len(rows)):
        word, position, length, _ = rows[index].tolist()
        if not is_sound(word, position, length, len(data), page_size):
            raise ValueError("pack_records: a row is no page record, or points outside the data")
        kind = word & KINDS
        parts = [word.to_bytes(8)]
        if not word & CONTINUE:
            parts.append(name)
        if kind == ZERO:
            parts.append(bytes(length))
        else:
            if kind == XBZRLE:
                parts.append(b"\1" + length.to_bytes(2))
            elif kind == COMPRESS:
                parts.append(length.to_bytes(4))
            parts.append(bytes(data[position : position + length]))
        record = b"".join(parts)
        if len(out) - at < len(record):
            return index, at
        out[at : at + len(record)] = record
        at += len(record)
    return len(rows), at


def is_sound(word: int, position: int, length: int, total: int, page_size: int) -> bool:
    """Whether a row is a page record, with a payload of a right length within *total* bytes."""
    match word & (page_size - 1) & ~CONTINUE:
        case 0x002:
            return length == 1
        case 0x008:
            right = length == page_size
        case 0x040:
            right = length <= min(page_size, 0xFFFF)
        case 0x100:
            right = length <= compress_bound(page_size)
        case _:
            return False
    return right and position <= total and length <= total - position
