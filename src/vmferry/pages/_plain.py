"""The kernels in plain Python: their specification, and what runs where none could be compiled."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import VmferryError

from .rows import COMPRESS, CONTINUE, KINDS, PAGE, XBZRLE, ZERO, Rows, compress_bound

Bytes = bytes | bytearray | memoryview
U64 = npt.NDArray[np.uint64]

_P1: Final = np.uint64(0x9E3779B185EBCA87)
_P2: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_P3: Final = np.uint64(0x165667B19E3779F9)
_P4: Final = np.uint64(0x85EBCA77C2B2AE63)


def page_sums(data: Bytes, page_size: int, sums: U64) -> None:
    """The sum of each whole page of *data* into *sums*: XXH64 with seed 0, and 0 for a zero page.

    A page with other content whose XXH64 is 0 gets 1.
    """
    if page_size < 32 or page_size % 32:
        raise ValueError("page_sums: page size not a multiple of 32")
    count = len(data) // page_size
    if len(sums) < count:
        raise ValueError("page_sums: sums too short")
    pages = np.frombuffer(data, "<u8", count * page_size // 8).reshape(count, page_size // 8)
    value = _xxh64(pages, page_size)
    value[value == 0] = 1
    value[~pages.any(axis=1)] = 0
    sums[:count] = value


def _xxh64(pages: U64, page_size: int) -> U64:
    lanes = [np.full(len(pages), seed, np.uint64) for seed in _seeds()]
    for at in range(0, page_size // 8, 4):
        for lane in range(4):
            lanes[lane] = _rotl(lanes[lane] + pages[:, at + lane] * _P2, 31) * _P1
    value: U64 = sum(
        (_rotl(v, n) for v, n in zip(lanes, (1, 7, 12, 18), strict=True)),
        np.zeros(len(pages), np.uint64),
    )
    for v in lanes:
        value = (value ^ (_rotl(v * _P2, 31) * _P1)) * _P1 + _P4
    value = value + np.uint64(page_size)
    value = (value ^ (value >> np.uint64(33))) * _P2
    value = (value ^ (value >> np.uint64(29))) * _P3
    return value ^ (value >> np.uint64(32))


def _seeds() -> Iterator[np.uint64]:
    mask = (1 << 64) - 1
    for seed in (int(_P1) + int(_P2), int(_P2), 0, -int(_P1)):
        yield np.uint64(seed & mask)


def _rotl(value: U64, count: int) -> U64:
    return (value << np.uint64(count)) | (value >> np.uint64(64 - count))


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
    rows: Rows, first: int, data: Bytes, page_size: int, name: bytes, out: bytearray | memoryview
) -> tuple[int, int]:
    """Write the records of ``rows[first:]`` into *out* as far as they fit.

    *name* is written in each record without the CONTINUE flag.  Returns the first row not written
    and the bytes written.
    """
    at = 0
    for index in range(first, len(rows)):
        word, position, length, _ = rows[index].tolist()
        if not _is_sound(word, position, length, len(data), page_size):
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


def _is_sound(word: int, position: int, length: int, total: int, page_size: int) -> bool:
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


def xbzrle_decode(encoded: Bytes, page: bytearray | memoryview) -> bool:
    """Patch *page* in place; false where *encoded* breaks a rule, with *page* then half patched.

    QEMU 7.2 ``migration/xbzrle.c``: pairs of an unchanged run and a changed run with its new bytes.
    """
    at = position = 0
    while at < len(encoded):
        if len(encoded) - at < 2:
            return False
        same, taken = _uleb(encoded, at)
        if not taken or (same == 0 and at != 0) or same > len(page) - position:
            return False
        at, position = at + taken, position + same
        changed, taken = _uleb(encoded, at)
        if not taken or changed == 0 or changed > len(page) - position:
            return False
        at += taken
        if changed > len(encoded) - at:
            return False
        page[position : position + changed] = encoded[at : at + changed]
        at, position = at + changed, position + changed
    return True


def _uleb(data: Bytes, at: int) -> tuple[int, int]:
    head = bytes(data[at : at + 2])
    if not head:
        return 0, 0
    if head[0] < 0x80:
        return head[0], 1
    if len(head) < 2 or head[1] >= 0x80:
        return 0, 0
    return (head[0] & 0x7F) | head[1] << 7, 2


def store_records(
    fd: int, rows: Rows, first: int, data: Bytes, page_size: int, sums: U64
) -> tuple[int, int]:
    """Write the pages of ``rows[first:]`` into the file of their RAM block, and their *sums*.

    A zero page becomes a hole.  Returns the first row not done and an errno: stops with 0 before a
    row that it cannot do (a compressed page, an XBZRLE record that breaks a rule, a row that is no
    page record or points outside the data or the block).  With another errno, rows behind the first
    may have been done too, or in part.
    """
    for index in range(first, len(rows)):
        word, position, length, _ = rows[index].tolist()
        offset = word & -page_size
        number = offset // page_size
        kind = word & KINDS
        if number >= len(sums) or not _is_sound(word, position, length, len(data), page_size):
            return index, 0
        try:
            page = _page_of(fd, kind, offset, data[position : position + length], page_size)
            if page is None:
                return index, 0
            value = np.zeros(1, np.uint64)
            page_sums(page, page_size, value)
            if value[0] or sums[number]:
                # Unlike the compiled kernel this writes zeros where a page became zero.
                os.pwrite(fd, page, offset)
        except OSError as error:
            return index, error.errno or errno.EIO
        sums[number] = value[0]
    return len(rows), 0


def _page_of(fd: int, kind: int, offset: int, payload: Bytes, page_size: int) -> Bytes | None:
    if kind == ZERO:
        return bytes(page_size)
    if kind == PAGE:
        return payload
    if kind == COMPRESS:
        return None
    page = bytearray(os.pread(fd, page_size, offset))
    if len(page) < page_size:
        raise OSError(errno.EIO, "the file is shorter than its pages")
    return page if xbzrle_decode(payload, page) else None


def unavailable(name: str, known: list[str]) -> VmferryError:
    """The error for a kernel asked for by name that is not there."""
    return VmferryError(
        f"VMFERRY_KERNELS asks for {name!r}; here are: {', '.join(known)}."
        " The compiled kernels are built by pip when a C compiler is present"
    )
