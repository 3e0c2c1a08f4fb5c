"""Guest memory as records for the main channel: every page once, as it is in its store."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from vmferry.errors import StorageError
from vmferry.migration.batches import BatchWriter
from vmferry.pages import KINDS, PAGE, ROW, ZERO, scan_records
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import RamBlock

Bytes = npt.NDArray[np.uint8]


class Store:
    """Pages in memory."""

    def __init__(self, pages: Bytes) -> None:
        self._bytes = memoryview(np.ascontiguousarray(pages)).cast("B")
        self.sums = pages.any(axis=1).astype(np.uint64)

    def read(self, offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            buffer[:] = self._bytes[offset : offset + len(buffer)]
            offset += len(buffer)


class Broken(Store):
    """Pages that cannot be read."""

    def read(self, offset: int, *_buffers: memoryview) -> None:
        raise StorageError(f"nothing at {offset}")


def pages_of(page_size: int, share: float, count: int = 700) -> Bytes:
    """Pages of which a *share* has data; with one half, long runs of both kinds too."""
    random = np.random.default_rng(1)
    pages = random.integers(1, 255, (count, page_size), dtype=np.uint8)
    pages[random.random(count) >= share] = 0
    if share == 0.5:
        pages[:300] = 0
        pages[300:650] = 1
    return pages


def written(store: Store, page_size: int, *, zero_only: bool = False) -> tuple[bytes, int, int]:
    """The records of all batches, and how many they say they are: with data, and zero."""
    block = RamBlock("pc.ram", len(store.sums) * page_size)
    normal = zero = 0
    out = bytearray()
    with BatchWriter(page_size) as writer:
        for batch in writer.batches(block, store, zero_only=zero_only):
            out += batch.encode()
            normal, zero = normal + batch.normal, zero + batch.zero
    return bytes(out), normal, zero


@pytest.mark.parametrize("page_size", [1024, 4096, 65536])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
def test_records_are_the_pages_in_their_order(page_size: int, share: float) -> None:
    pages = pages_of(page_size, share)
    data, normal, zero = written(Store(pages), page_size)
    rows = np.zeros(len(pages), ROW)
    name = encode_name("pc.ram")
    assert scan_records(data, 0, len(data), page_size, pages.nbytes, name, rows) == (
        len(data),
        len(pages),
    )
    assert data[8 : 8 + len(name)] == name
    assert (rows["word"] // page_size == np.arange(len(pages))).all()
    found = np.zeros_like(pages)
    for number, (word, position, length, _) in enumerate(rows.tolist()):
        if word & PAGE:
            found[number] = np.frombuffer(data, np.uint8, length, position)
    assert (found == pages).all()
    assert (normal, zero) == (int(pages.any(axis=1).sum()), int((~pages.any(axis=1)).sum()))


def test_zero_pages_alone_are_those_without_data() -> None:
    pages = pages_of(4096, 0.5)
    data, normal, zero = written(Store(pages), 4096, zero_only=True)
    rows = np.zeros(len(pages), ROW)
    _, count = scan_records(data, 0, len(data), 4096, pages.nbytes, encode_name("pc.ram"), rows)
    assert (normal, zero) == (0, count)
    assert (rows["word"][:count] & np.uint64(KINDS) == ZERO).all()
    assert (rows["word"][:count] // 4096 == np.flatnonzero(~pages.any(axis=1))).all()


def test_a_store_that_cannot_be_read_ends_it() -> None:
    with pytest.raises(StorageError, match="nothing at 0"):
        written(Broken(pages_of(4096, 1)), 4096)
