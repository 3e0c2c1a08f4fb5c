"""Guest memory as batches of page records, ready to be written.

QEMU 7.2 ``migration/ram.c`` (``ram_save_host_page``).  Every page is sent, zero ones too: the
destination's own firmware may have filled them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.pages import CONTINUE, PAGE, ZERO, pack_records
from vmferry.pages.rows import ROW
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import RamBlock

from .outgoing import PageStore

_DATA: Final = 1 << 20
"""Bytes read from a store at once; they stay in the second-level cache until they are sent."""

_ZEROS: Final = 1 << 15
"""Zero pages in one batch: 288 KiB of records."""


class BatchWriter:
    """Turns pages of one block into bytes for the main channel.

    Lends one buffer, which is right until the next batch.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._data = memoryview(bytearray(_DATA))
        most = _DATA // page_size * (page_size + 9)
        self._out = memoryview(bytearray(max(most, _ZEROS * 9) + 256))

    def batches(self, block: RamBlock, store: PageStore, *, zero_only: bool) -> Iterator[Batch]:
        """The records of all pages of the block, or of its zero pages alone."""
        name = encode_name(block.name)
        step = _DATA // self._page_size
        named = True
        first = 0
        while first < len(store.sums):
            zeros = zero_run(store.sums, first)
            count = zeros or min(step, len(store.sums) - first)
            chosen = np.arange(first, first + count, dtype=np.uint64)
            if zero_only:
                chosen = chosen[store.sums[first : first + count] == 0]
            if len(chosen):
                yield self._batch(store, name, chosen, first, named=named, data=not zeros)
                named = False
            first += count

    def _batch(
        self,
        store: PageStore,
        name: bytes,
        pages: npt.NDArray[np.uint64],
        first: int,
        *,
        named: bool,
        data: bool,
    ) -> Batch:
        size = self._page_size
        zero = store.sums[pages] == 0
        if data and not zero.all():
            count = int(pages[-1]) - first + 1
            store.read(first * size, self._data[: count * size])
        rows = np.zeros(len(pages), ROW)
        kinds = np.where(zero, np.uint64(ZERO | CONTINUE), np.uint64(PAGE | CONTINUE))
        rows["word"] = pages * np.uint64(size) | kinds
        if named:
            rows["word"][0] &= ~np.uint64(CONTINUE)
        rows["position"] = (pages - np.uint64(first)) * np.uint64(size)
        rows["length"] = np.where(zero, 1, size)
        _, used = pack_records(rows, 0, self._data, size, name, self._out)
        zeros = int(np.count_nonzero(zero))
        return Batch(self._out[:used], len(pages) - zeros, zeros)


class Batch:
    """Bytes of some records, and how many of each kind they are."""

    __slots__ = ("_data", "normal", "zero")

    def __init__(self, data: memoryview, normal: int, zero: int) -> None:
        self._data = data
        self.normal = normal
        self.zero = zero

    def encode(self) -> memoryview:
        """The records as on the wire."""
        return self._data


def zero_run(sums: npt.NDArray[np.uint64], first: int) -> int:
    """How many pages from *first* on are zero, looking no further than one batch."""
    ahead = sums[first : first + _ZEROS]
    data = np.flatnonzero(ahead) if ahead[0] == 0 else np.zeros(1, np.intp)
    return int(data[0]) if len(data) else len(ahead)
