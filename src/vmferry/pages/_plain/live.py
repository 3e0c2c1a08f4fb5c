"""Between the memory of a guest and wire buffers.

*memory* is a whole RAM block, *pages* are numbers of pages in it, and *name* is the block's name as
on the wire, length byte first.  ``ValueError`` where they do not fit each other.

The guest may run and write meanwhile.  What is sent of a page is then any mixture of old and new,
and a page that was found zero may be so no more: a write that comes after the page was taken from
the dirty log is in the log again, so the page is sent again.

*known* has a byte for each page of the block, and 0 says that the page never had content: it is
taken as zero and not looked at, because reading alone gives shared memory a page of its own.
"""

from __future__ import annotations

import os

import numpy as np

from vmferry.pages.rows import CONTINUE, KINDS, PAGE, ZERO, Rows

from .records import is_sound
from .types import U8, U64, Bytes, Memory
from .xbzrle import xbzrle_decode


def pack_pages(
    memory: Memory,
    pages: U64,
    first: int,
    page_size: int,
    name: bytes,
    named: bool,
    out: Memory,
    known: Bytes | U8 = b"",
) -> tuple[int, int, int]:
    """Write records of the pages ``pages[first:]`` into *out* as far as they fit.

    A page of zeros becomes a ZERO record, any other a PAGE record; the first one carries the name
    where *named* says so.  Returns the index of the first page not written, the bytes written, and
    how many pages were zero.
    """
    memory, known, total = checked(memory, page_size, known)
    if first < 0 or (named and not name):
        raise ValueError("pack_pages: a page before the first, or a name without bytes")
    room = view(out)
    at = zeros = 0
    for index, page in enumerate(pages[first:].tolist(), first):
        if page >= total:
            raise ValueError("pack_pages: a page outside the memory")
        content = _content(memory, page, page_size, known)
        word = page * page_size | (PAGE if content else ZERO) | (0 if named else CONTINUE)
        record = word.to_bytes(8) + (name if named else b"") + (content or b"\0")
        if len(record) > len(room) - at:
            return index, at, zeros
        room[at : at + len(record)] = record
        at += len(record)
        zeros += not content
        named = False
    return max(first, len(pages)), at, zeros


def zero_pages(
    memory: Memory, pages: U64, page_size: int, zero: U8, known: Bytes | U8 = b""
) -> int:
    """Say in *zero* which of *pages* are zero, 1 or 0 for each; returns how many."""
    memory, known, total = checked(memory, page_size, known)
    if len(zero) < len(pages):
        raise ValueError("zero_pages: the mask is too short")
    for index, page in enumerate(pages.tolist()):
        if page >= total:
            raise ValueError("zero_pages: a page outside the memory")
        zero[index] = not _content(memory, page, page_size, known)
    return int(zero[: len(pages)].sum())


def gather_pages(memory: Memory, pages: U64, page_size: int, out: Memory) -> int:
    """Copy *pages* into *out*, one behind the other; returns the bytes written."""
    memory, _, total = checked(memory, page_size, b"")
    room = view(out)
    if len(room) // page_size < len(pages):
        raise ValueError("gather_pages: more pages than out has room for")
    for index, page in enumerate(pages.tolist()):
        if page >= total:
            raise ValueError("gather_pages: a page outside the memory")
        at, end = index * page_size, (index + 1) * page_size
        room[at:end] = memory[page * page_size : (page + 1) * page_size]
    return len(pages) * page_size


def apply_records(
    memory: Memory,
    rows: Rows,
    first: int,
    data: Bytes,
    page_size: int,
    known: Memory,
    fd: int = -1,
) -> int:
    """Put the pages of ``rows[first:]`` into *memory*, and mark in *known* those with content.

    Memory must have been zero where *known* is 0; such a page stays untouched where a record says
    that it is zero.  *fd* may be the file of which *memory* is a mapping: it takes pages that never
    had content with half the work.

    Returns the first row not done: ``len(rows)``, or a row that it cannot do (a compressed page, an
    XBZRLE record that breaks a rule, whose page is then half patched, or a row that is no page
    record or points outside the data or the block).  Several threads may do this at once, as long
    as no two have the same page.
    """
    memory, found, total = checked(memory, page_size, known)
    if first < 0 or len(found) < total:
        raise ValueError(
            "apply_records: a row before the first, or known not one byte for each page"
        )
    for index in range(first, len(rows)):
        word, position, length, _ = rows[index].tolist()
        page = word // page_size
        if page >= total or not is_sound(word, position, length, len(data), page_size):
            return index
        payload = bytes(data[position : position + length])
        target = memory[page * page_size : (page + 1) * page_size]
        if fd >= 0 and word & KINDS == PAGE and not found[page] and not is_zero(payload):
            os.pwrite(fd, payload, page * page_size)
        if not _apply(word & KINDS, payload, target, found[page : page + 1]):
            return index
    return max(first, len(rows))


def _apply(kind: int, payload: bytes, page: memoryview, known: memoryview) -> bool:
    match kind:
        case 0x040:
            known[0] = 1
            return xbzrle_decode(payload, page)
        case 0x008:
            if known[0] or not is_zero(payload):
                known[0] = 1
                page[:] = payload
        case 0x002:
            if known[0] and not is_zero(bytes(page)):
                page[:] = bytes(len(page))
        case _:
            return False
    return True


def is_zero(page: bytes) -> bool:
    """Whether all bytes are 0."""
    return page == bytes(len(page))


def checked(
    memory: Bytes | U8, page_size: int, known: Bytes | U8
) -> tuple[memoryview, memoryview, int]:
    """Both as views, and how many pages *memory* has."""
    if page_size < 1024 or page_size & (page_size - 1):
        raise ValueError("page size: no power of two from 1024 on")
    total = len(memory) // page_size
    if 0 < len(known) < total:
        raise ValueError("known: not one byte for each page")
    return view(memory), view(known), total


def view(data: Bytes | U8) -> memoryview:
    """Bytes of any kind, to be sliced without copying."""
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


def _content(memory: memoryview, page: int, page_size: int, known: memoryview) -> bytes:
    """A copy of the page; empty where it is zero."""
    if len(known) and not known[page]:
        return b""
    content = bytes(memory[page * page_size : (page + 1) * page_size])
    return b"" if is_zero(content) else content
