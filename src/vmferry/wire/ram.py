"""The `ram` section, version 4: block list, page records, end of section.

QEMU 7.2 ``migration/ram.c``.  Every record starts with a big-endian 64-bit word: an offset in a RAM
block, a multiple of the target page, with the record's flags in the low bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from vmferry.errors import LimitExceeded, StreamError, printable
from vmferry.pages import (
    COMPRESS,
    CONTINUE,
    KINDS,
    PAGE,
    ROW,
    XBZRLE,
    ZERO,
    Rows,
    compress_bound,
    pack_records,
    scan_records,
)

from . import limits
from .buffer import Cursor, Parse, encode_name, within
from .layout import RAM_END, RAM_FLUSH, RAM_FULL, RAM_HOOK, RAM_SIZES

# Bytes of each kind of page between the name of its block and its payload.
_HEADS: Final = {PAGE: 0, ZERO: 1, XBZRLE: 3, COMPRESS: 4}

BATCH: Final = 4096
"""Records in one batch at the most: 16 MiB of pages, or zero records of as much."""


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A named piece of guest memory: *length* bytes, a multiple of the target page.

    ``page_size`` is the host's page size for the block, sent only where a postcopy source uses huge
    pages (QEMU 2.9).  ``address`` is its place in the memory region around it, sent under
    ``x-ignore-shared`` (4.0).
    """

    name: str
    length: int
    page_size: int | None = None
    address: int | None = None

    def encode(self) -> bytes:
        """The block's entry in the block list."""
        numbers = (self.length, self.page_size, self.address)
        return encode_name(self.name) + b"".join(n.to_bytes(8) for n in numbers if n is not None)


@dataclass(frozen=True, slots=True)
class RamBlocks:
    """The block list: what memory the machine has, in the order of the pages that follow."""

    blocks: tuple[RamBlock, ...]

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(block.length for block in self.blocks)

    def encode(self) -> bytes:
        """The record as on the wire."""
        return (self.total | RAM_SIZES).to_bytes(8) + b"".join(b.encode() for b in self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class RamPages:
    """A batch of page records of one block, in stream order; no object stands for a page.

    ``rows`` has a row of :data:`vmferry.pages.ROW` for each record, which points into ``data``.
    ``data`` lends the reader's buffer: right until more is read into it; its first byte is byte
    ``start`` of the channel.
    """

    block: RamBlock
    rows: Rows
    data: memoryview
    page_size: int
    start: int = 0

    @property
    def kinds(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """PAGE, ZERO, XBZRLE or COMPRESS for each record."""
        return self.rows["word"] & np.uint64(KINDS & (self.page_size - 1))

    @property
    def offsets(self) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The offset in the block of each page, in bytes."""
        return self.rows["word"] & ~np.uint64(self.page_size - 1)

    def encode(self) -> bytes:
        """The records as on the wire."""
        name = encode_name(self.block.name)
        extra = len(name) + 8 + 4
        out = bytearray(int(self.rows["length"].sum()) + len(self.rows) * extra)
        _, size = pack_records(self.rows, 0, self.data, self.page_size, name, out)
        return bytes(memoryview(out)[:size])


@dataclass(frozen=True, slots=True)
class RamFlush:
    """All multifd channels must have delivered what they were sent (QEMU 8.1)."""

    def encode(self) -> bytes:
        """The record as on the wire."""
        return RAM_FLUSH.to_bytes(8)


@dataclass(frozen=True, slots=True)
class RamEnd:
    """The end of this section's records; with multifd before QEMU 8.1 also a flush."""

    def encode(self) -> bytes:
        """The record as on the wire."""
        return RAM_END.to_bytes(8)


@dataclass(slots=True)
class RamReader:
    """Reads the bodies of `ram` sections; remembers the blocks and the current one.

    ``page_size`` is the target page in bytes.  ``addresses`` says that entries of the block list
    carry addresses, ``huge_pages`` that they may carry page sizes, ``postcopy`` that pages
    are placed whole from now on.
    """

    page_size: int
    max_ram: int
    addresses: bool = False
    huge_pages: bool = False
    blocks: dict[str, RamBlock] = field(default_factory=dict)
    postcopy: bool = False
    _current: RamBlock | None = None
    _name: bytes = b""
    _rows: Rows = field(default_factory=lambda: np.zeros(BATCH, ROW))

    @property
    def current(self) -> str | None:
        """The block of the latest page."""
        return None if self._current is None else self._current.name

    def go_on_in(self, block: str) -> None:
        """Let a page that names no block be one of *block*."""
        self._current, self._name = self.blocks[block], encode_name(block)

    def body(self, at: Cursor) -> Parse[None]:
        """Read one body up to and with its end record; yields the events above."""
        while True:
            word = yield from at.peek_number(8, "a record of guest memory")
            flags = word & (self.page_size - 1)
            if flags & ~CONTINUE in _HEADS:
                yield from self._pages(at, word)
            elif flags == RAM_SIZES:
                yield (yield from self._block_list(at))
            elif word == RAM_FLUSH:
                at.buffer.advance(8)
                yield RamFlush()
            elif word == RAM_END:
                at.buffer.advance(8)
                yield RamEnd()
                return
            else:
                raise self._unknown(at, word)

    def _unknown(self, at: Cursor, word: int) -> StreamError:
        flags = word & (self.page_size - 1)
        advice = None
        if flags & RAM_HOOK:
            advice = "hooks belong to RDMA and cannot occur on a byte stream"
        elif flags & RAM_FULL:
            advice = "this record is obsolete"
        return at.fail(
            "a record of guest memory: sizes, zero, page, xbzrle, compressed, flush or end",
            f"the word {word:#018x}",
            advice=advice,
        )

    def _block_list(self, at: Cursor) -> Parse[RamBlocks]:
        offset = at.buffer.offset
        total = (yield from at.number(8, "the size of all RAM")) & -self.page_size
        if self.blocks:
            raise at.fail("one list of RAM blocks", "a second one", offset=offset)
        if total > self.max_ram:
            raise LimitExceeded(
                f"at most {self.max_ram} bytes of guest memory",
                str(total),
                offset=offset,
                advice="allow more with --max-ram",
            )
        if total == 0:
            raise at.fail("one RAM block or more", "none", offset=offset)
        blocks: dict[str, RamBlock] = {}
        left = total
        while left:
            offset = at.buffer.offset
            if len(blocks) == limits.RAM_BLOCKS:
                raise LimitExceeded(f"at most {limits.RAM_BLOCKS} RAM blocks", "more")
            block = yield from self._block(at, left)
            if block.name in blocks:
                again = f"{printable(block.name)} again"
                raise at.fail("each RAM block once", again, offset=offset)
            blocks[block.name] = block
            left -= block.length
        self.blocks = blocks
        return RamBlocks(tuple(blocks.values()))

    def _block(self, at: Cursor, left: int) -> Parse[RamBlock]:
        offset = at.buffer.offset
        name = yield from at.name("the name of a RAM block")
        length = yield from at.number(8, "the length of a RAM block")
        if length == 0 or length % self.page_size or length > left:
            raise at.fail(
                f"whole pages of {self.page_size} bytes, at most {left:#x} bytes of them"
                " (the lengths add up to the total)",
                f"{length:#x} bytes",
                offset=offset,
                block=name,
            )
        page_size = address = None
        if self.addresses:
            address = yield from at.number(8, "the address of a RAM block")
        elif self.huge_pages and (yield from self._has_page_size(at, last=length == left)):
            offset = at.buffer.offset
            page_size = yield from at.number(8, "the page size of a RAM block")
            if page_size & (page_size - 1) or not 1024 <= page_size <= 1 << 40:
                raise at.fail(
                    "a power of two as page size", f"{page_size:#x}", offset=offset, block=name
                )
        return RamBlock(name, length, page_size, address)

    def _has_page_size(self, at: Cursor, *, last: bool) -> Parse[bool]:
        # The field is not announced for each block: a name starts with its length, never 0, a page
        # size below 2^56 with 0; a record after the last block has flags, a page size has none.
        if last:
            word = yield from at.peek_number(8, "a record of guest memory")
            return word & (self.page_size - 1) == 0
        return (yield from at.peek_number(1, "the name of a RAM block")) == 0

    def _pages(self, at: Cursor, word: int) -> Parse[None]:
        if not word & CONTINUE:
            yield from self._switch_block(at, word)
        block = self._current
        if block is None:
            raise at.fail("a page that names its RAM block", "one that continues the block before")
        yield from within(self._batch(at, word, block), block=block.name)

    def _switch_block(self, at: Cursor, word: int) -> Parse[None]:
        yield from at.need(9, "the name of a RAM block")
        size = 9 + at.buffer.peek(9)[8]
        yield from at.need(size, "the name of a RAM block")
        name = bytes(at.buffer.peek(size)[8:])
        if name == self._name:
            return
        block = self.blocks.get(name[1:].decode("utf-8", "surrogateescape"))
        if block is None:
            raise at.fail(
                "the name of a RAM block from the list before",
                printable(name[1:]),
                advice=f"the record is {word:#018x}",
            )
        self._current, self._name = block, name

    def _batch(self, at: Cursor, word: int, block: RamBlock) -> Parse[None]:
        if self.postcopy and word & XBZRLE:
            raise at.fail("a whole page, in postcopy", "an XBZRLE page")
        buffer, rows = at.buffer, self._rows
        view = buffer.view()
        stop, count = scan_records(
            view, 0, len(view), self.page_size, block.length, self._name, rows
        )
        if self.postcopy:
            stop, count = self._before_delta(stop, count)
        if count == 0:
            yield from self._await_record(at, word, block)
            return
        start = buffer.offset
        buffer.advance(stop)
        yield RamPages(block, rows[:count].copy(), view, self.page_size, start)

    def _before_delta(self, stop: int, count: int) -> tuple[int, int]:
        """Where the records that were scanned, but for the first, come to an XBZRLE page."""
        deltas = np.flatnonzero(self._rows["word"][:count] & np.uint64(XBZRLE))
        if not len(deltas):
            return stop, count
        last = self._rows[deltas[0] - 1]
        return int(last["position"] + last["length"]), int(deltas[0])

    def _await_record(self, at: Cursor, word: int, block: RamBlock) -> Parse[None]:
        """Wait for the whole of a record that the kernel left, or say what is wrong with it."""
        offset, kind = word & -self.page_size, word & KINDS
        if offset > block.length - self.page_size:
            raise at.fail(
                f"a page below {block.length:#x}, the end of its block", f"one at {offset:#x}"
            )
        size = 8 + (0 if word & CONTINUE else len(self._name))
        yield from at.need(size + _HEADS[kind], "the head of a page")
        head = bytes(at.buffer.peek(size + _HEADS[kind])[size:])
        yield from at.need(size + len(head) + self._payload(at, kind, head), "a page")

    def _payload(self, at: Cursor, kind: int, head: bytes) -> int:
        """Bytes behind the *head* of a page, which stands behind word and name."""
        if kind == PAGE:
            return self.page_size
        if kind == ZERO:
            if head != b"\0":
                raise at.fail("a zero page filled with 0", f"one filled with {head[0]:#04x}")
            return 0
        if kind == XBZRLE:
            most, length = self.page_size, int.from_bytes(head[1:])
            if head[0] != 1:
                raise at.fail("XBZRLE encoding 1", f"encoding {head[0]}")
        else:
            most, length = compress_bound(self.page_size), int.from_bytes(head)
        if length > most:
            raise LimitExceeded(
                f"at most {most} bytes of an encoded page", str(length), offset=at.buffer.offset
            )
        return length
