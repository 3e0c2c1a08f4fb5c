"""Runs of units as page records, read from where they are stored."""

from __future__ import annotations

from typing import Final

import numpy as np

from vmferry.pages import CONTINUE, PAGE, ZERO, pack_records, zero_pages
from vmferry.pages.rows import ROW
from vmferry.transports import Buffer
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import RamBlock

from .left import Run


class Records:
    """Makes the records of one channel, for runs of at most *room* bytes.

    A unit without content has zero records where it is asked for, and none where it is not:
    the destination has zeros there.  What is returned is right until the next call.
    """

    def __init__(self, page_size: int, room: int) -> None:
        self._page_size = page_size
        self._data = memoryview(bytearray(room))
        pages = room // page_size
        self._numbers = np.arange(pages, dtype=np.uint64)
        self._zero = np.zeros(pages, np.uint8)
        self._out = memoryview(bytearray(room + 9 * pages + 256))
        self._last: RamBlock | None = None

    def of(self, run: Run, *, asked: bool) -> tuple[list[Buffer], int]:
        """The bytes to send, and how many pages they have with content."""
        size = run.count * run.block.unit
        data, start = self._data[:size], run.first * run.block.unit
        run.block.store.read(start, data)
        if size == self._page_size:
            return self._one(run, data, start, asked=asked)
        return self._many(run, data, start, asked=asked)

    def _one(
        self, run: Run, data: memoryview, start: int, *, asked: bool
    ) -> tuple[list[Buffer], int]:
        zero = bool(zero_pages(data, self._numbers[:1], self._page_size, self._zero))
        if zero and not asked:
            run.block.sent[run.first] = False
            return [], 0
        name = self._name(run.block.ram)
        word = start | (ZERO if zero else PAGE) | (0 if name else CONTINUE)
        head = word.to_bytes(8) + name
        return ([head, b"\0"], 0) if zero else ([head, data], 1)

    def _many(
        self, run: Run, data: memoryview, start: int, *, asked: bool
    ) -> tuple[list[Buffer], int]:
        pages = len(data) // self._page_size
        zero = self._zero[:pages]
        zeros = zero_pages(data, self._numbers[:pages], self._page_size, zero)
        chosen = np.arange(pages)
        if zeros and not asked:
            per_unit = run.block.unit // self._page_size
            empty = zero.reshape(-1, per_unit).all(axis=1)
            run.block.sent[run.first : run.first + run.count] = ~empty
            chosen = np.flatnonzero(np.repeat(~empty, per_unit))
            if not len(chosen):
                return [], 0
        name = self._name(run.block.ram)
        is_zero = zero[chosen] != 0
        rows = np.zeros(len(chosen), ROW)
        kinds = np.where(is_zero, np.uint64(ZERO | CONTINUE), np.uint64(PAGE | CONTINUE))
        rows["word"] = (chosen * self._page_size + start).astype(np.uint64) | kinds
        if name:
            rows["word"][0] &= ~np.uint64(CONTINUE)
        rows["position"] = chosen * self._page_size
        rows["length"] = np.where(is_zero, 1, self._page_size)
        _, used = pack_records(rows, 0, data, self._page_size, name, self._out)
        return [self._out[:used]], len(chosen) - int(np.count_nonzero(is_zero))

    def _name(self, block: RamBlock) -> bytes:
        """What names the block in a record, empty where the one before was of the same."""
        if block is self._last:
            return b""
        self._last = block
        return encode_name(block.name)


ROOM: Final = 128 << 10
"""Bytes of pages sent in one go, at least one unit."""
