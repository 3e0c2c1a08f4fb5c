"""Guest memory as batches of page records, ready to be written.

QEMU 7.2 ``migration/ram.c`` (``ram_save_host_page``).  Every page is sent, zero ones too: the
destination's own firmware may have filled them.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from vmferry.pages import CONTINUE, PAGE, ZERO, pack_records
from vmferry.pages.rows import ROW
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import RamBlock

from .outgoing import PageStore

Numbers = npt.NDArray[np.uint64]

_DATA: Final = 1 << 20
"""Bytes read from a store at once; they stay in the second-level cache until they are sent."""

_ZEROS: Final = 1 << 15
"""Zero pages in one batch: 288 KiB of records."""

_NAME: Final = 256
"""Bytes kept free in front of the records, for the name of the block in the first one."""

_READERS: Final = 2
"""Threads that read ahead: one alone is slower than a fast destination, even from memory."""


class BatchWriter:
    """Turns pages of a block into bytes for the main channel; a context manager.

    Reads ahead.  A batch is right until the next one is asked for.
    """

    def __init__(self, page_size: int) -> None:
        self._step = _DATA // page_size
        # One more is in the hands of whoever sends.
        self._buffers = [_Buffer(page_size) for _ in range(_READERS + 1)]
        self._pool = ThreadPoolExecutor(_READERS, "read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def batches(self, block: RamBlock, store: PageStore, *, zero_only: bool) -> Iterator[Batch]:
        """The records of all pages of the block, or of its zero pages alone."""
        name = encode_name(block.name)
        waiting: deque[Future[Batch]] = deque()
        runs = self._runs(store, zero_only=zero_only)
        for pages, buffer in zip(runs, itertools.cycle(self._buffers), strict=False):
            waiting.append(self._pool.submit(buffer.fill, store, name, pages))
            name = b""
            if len(waiting) == len(self._buffers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _runs(self, store: PageStore, *, zero_only: bool) -> Iterator[Numbers]:
        """The numbers of the pages in each batch, ascending."""
        first = 0
        while first < len(store.sums):
            count = zero_run(store.sums, first) or min(self._step, len(store.sums) - first)
            pages = np.arange(first, first + count, dtype=np.uint64)
            if zero_only:
                pages = pages[store.sums[first : first + count] == 0]
            if len(pages):
                yield pages
            first += count


class _Buffer:
    """Memory for one batch at a time."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._data = memoryview(bytearray(_DATA))
        record, most = page_size + 8, _DATA // page_size
        self._out = memoryview(bytearray(_NAME + max(most * record, _ZEROS * 9)))
        # Where words and pages lie in a run of pages with data.
        run = self._out[_NAME : _NAME + most * record]
        self._words = np.frombuffer(run, np.dtype([("word", ">u8"), ("page", "V", page_size)]))
        self._pages = [run[end - page_size : end] for end in range(record, len(run) + 1, record)]

    def fill(self, store: PageStore, name: bytes, pages: Numbers) -> Batch:
        """The records of *pages*, the first one with the block's *name* unless that is empty.

        Where one of them has data they follow each other, and are no more than fit.
        """
        zero = store.sums[pages] == 0
        if not zero.any():
            return self._run(store, name, pages)
        if zero.all():
            return self._mixed(name, pages, np.ones(len(pages), bool))
        store.read(int(pages[0]) * self._page_size, self._data[: len(pages) * self._page_size])
        return self._mixed(name, pages, zero)

    def _run(self, store: PageStore, name: bytes, pages: Numbers) -> Batch:
        """Pages with data, read to where they are sent from."""
        size, count = self._page_size, len(pages)
        store.read(int(pages[0]) * size, *self._pages[:count])
        words = self._words["word"]
        words[:count] = pages * np.uint64(size) | np.uint64(PAGE | CONTINUE)
        start = _NAME - len(name)
        if name:
            head = int(words[0]) & ~CONTINUE
            self._out[start : _NAME + 8] = head.to_bytes(8) + name
        return Batch(self._out[start : _NAME + count * (size + 8)], count, 0)

    def _mixed(self, name: bytes, pages: Numbers, zero: npt.NDArray[np.bool_]) -> Batch:
        """Pages of which those that are not *zero* have been read."""
        size = np.uint64(self._page_size)
        rows = np.zeros(len(pages), ROW)
        kinds = np.where(zero, np.uint64(ZERO | CONTINUE), np.uint64(PAGE | CONTINUE))
        rows["word"] = pages * size | kinds
        if name:
            rows["word"][0] &= ~np.uint64(CONTINUE)
        rows["position"] = (pages - pages[0]) * size
        rows["length"] = np.where(zero, 1, size)
        _, used = pack_records(rows, 0, self._data, self._page_size, name, self._out)
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


def zero_run(sums: Numbers, first: int) -> int:
    """How many pages from *first* on are zero, looking no further than one batch."""
    ahead = sums[first : first + _ZEROS]
    data = np.flatnonzero(ahead) if ahead[0] == 0 else np.zeros(1, np.intp)
    return int(data[0]) if len(data) else len(ahead)
