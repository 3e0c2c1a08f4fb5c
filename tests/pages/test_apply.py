from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.blocks import ONES, TWOS, ZEROS, mapped, memory_of
from tests.pages.twins import (
    COMPRESS,
    PAGE,
    XBZRLE,
    ZERO,
    both,
    compiled,
    needs_compiled,
    plain,
    rows_from,
)
from tests.pages.xbzrle import encode
from vmferry.pages import ROW

NAME = b"\x06pc.ram"


@contextlib.contextmanager
def open_memory(size: int) -> Iterator[tuple[int, np.ndarray]]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size)
    mapping = mmap.mmap(fd, size)
    yield fd, np.frombuffer(mapping, np.uint8)
    os.close(fd)


PAGES = 64


def applied(kernels, memory, *rows, data=b"", known=None, first=0):
    known = np.ones(len(memory) // 4096, np.uint8) if known is None else known
    return kernels.apply_records(memory, rows_from(*rows), first, data, 4096, known)


@both
def test_pages_go_to_their_places(kernels):
    memory = memory_of(ONES, ONES, ONES, ONES)
    rows = [(0x2000 | PAGE, 4096, 4096), (0x1000 | ZERO, 0, 1), (0x3000 | PAGE, 0, 4096)]
    assert applied(kernels, memory, *rows, data=ZEROS + TWOS) == 3
    assert memory.tobytes() == ONES + ZEROS + TWOS + ZEROS


@both
def test_pages_with_content_are_known_afterwards(kernels):
    memory, known = memory_of(*[ZEROS] * 4), np.zeros(4, np.uint8)
    rows = [(PAGE, 0, 4096), (0x2000 | XBZRLE, 4096, 3), (0x3000 | ZERO, 0, 1)]
    assert applied(kernels, memory, *rows, data=ONES + b"\0\1\x90", known=known) == 3
    assert known.tolist() == [1, 0, 1, 0]
    assert memory.tobytes() == ONES + ZEROS + b"\x90" + bytes(8191)


@both
def test_zero_pages_of_either_form_leave_holes(kernels):
    with mapped(PAGES) as (memory, taken):
        known = np.zeros(PAGES, np.uint8)
        kinds = [(ZERO, 0, 1), (PAGE, 0, 4096)]
        rows = [(n * 4096 | kinds[n % 2][0], *kinds[n % 2][1:]) for n in range(PAGES)]
        assert applied(kernels, memory, *rows, data=ZEROS, known=known) == PAGES
        assert taken() == 0
        assert not known.any()


@both
def test_pages_without_content_before_may_come_through_the_file(kernels):
    size = PAGES * 4096
    with open_memory(size) as (fd, memory):
        known = np.zeros(PAGES, np.uint8)
        known[5] = 1
        order = [0, 1, 2, 7, 5, 6, 6, 3, 4]
        rows = rows_from(*((n * 4096 | PAGE, at * 4096, 4096) for at, n in enumerate(order)))
        data = b"".join(bytes([at + 1]) * 4096 for at in range(len(order)))
        assert kernels.apply_records(memory, rows, 0, data, 4096, known, fd) == len(order)
        wanted = [1, 2, 3, 8, 9, 5, 7, 4]
        assert memory.reshape(-1, 4096)[:8, 0].tolist() == wanted
        assert memory.reshape(-1, 4096)[:8, 4095].tolist() == wanted
        assert known[:9].tolist() == [1] * 8 + [0]


@both
def test_last_of_several_records_of_a_page_wins(kernels):
    memory, known = memory_of(ZEROS, ZEROS), np.zeros(2, np.uint8)
    rows = [(PAGE, 0, 4096), (ZERO, 0, 1), (0x1000 | ZERO, 0, 1), (0x1000 | PAGE, 0, 4096)]
    assert applied(kernels, memory, *rows, data=ONES, known=known) == 4
    assert memory.tobytes() == ZEROS + ONES


@both
def test_xbzrle_patches_the_page_that_is_there(kernels):
    memory, new = memory_of(ZEROS, ONES), ONES[:100] + b"\7\7" + ONES[102:]
    delta = encode(ONES, new)
    rows = [(0x1000 | XBZRLE, 0, len(delta)), (XBZRLE, 0, 0)]
    assert applied(kernels, memory, *rows, data=delta) == 2
    assert memory.tobytes() == ZEROS + new


# Why a row is not applied, and the row; the data has two pages, the memory four.
BAD_ROWS = [
    ("a page behind the block", (0x4000 | PAGE, 0, 4096)),
    ("an offset of nearly 2^64", ((1 << 64) - 4096 | PAGE, 0, 4096)),
    ("a payload behind the data", (PAGE, 8193, 4096)),
    ("a payload that ends behind the data", (PAGE, 4097, 4096)),
    ("a payload at nearly 2^64", (PAGE, (1 << 64) - 1, 4096)),
    ("a page that is too short", (PAGE, 8191, 1)),
    ("a zero page of another length", (ZERO, 0, 2)),
    ("a compressed page", (COMPRESS, 0, 52)),
    ("no kind", (0, 0, 4096)),
    ("two kinds", (PAGE | ZERO, 0, 4096)),
    ("an unknown flag", (PAGE | 0x400, 0, 4096)),
    ("a broken xbzrle encoding", (XBZRLE, 0, 2)),
    ("xbzrle behind the data", (XBZRLE, 8190, 3)),
]


@both
@pytest.mark.parametrize(("why", "row"), BAD_ROWS, ids=[b[0] for b in BAD_ROWS])
def test_apply_stops_before(kernels, why, row):
    memory = memory_of(ZEROS, ZEROS, ZEROS, ZEROS)
    rows = [(0x1000 | PAGE, 0, 4096), (0x2000 | PAGE, 0, 4096), row, (0x3000 | PAGE, 0, 4096)]
    assert applied(kernels, memory, *rows, data=ONES + TWOS) == 2
    assert memory.tobytes() == ZEROS + ONES + ONES + ZEROS
    assert applied(kernels, memory, *rows, data=ONES + TWOS, first=3) == 4
    assert memory.tobytes() == ZEROS + ONES + ONES + ONES


@both
def test_what_does_not_fit_is_refused(kernels):
    memory, rows = memory_of(ZEROS, ZEROS), rows_from((ZERO, 0, 1))
    for known in (np.zeros(0, np.uint8), np.zeros(1, np.uint8)):
        with pytest.raises(ValueError, match="known"):
            kernels.apply_records(memory, rows, 0, b"", 4096, known)
    with pytest.raises(ValueError, match="before the first"):
        applied(kernels, memory, (ZERO, 0, 1), first=-1)
    with pytest.raises(ValueError, match="page size"):
        kernels.apply_records(memory, rows, 0, b"", 512, np.zeros(99, np.uint8))


@both
def test_rest_of_less_than_a_page_is_not_written(kernels):
    memory = memory_of(ZEROS, ZEROS[:-1])
    assert applied(kernels, memory, (0x1000 | PAGE, 0, 4096), data=ONES) == 0
    assert not memory.any()


contents = st.sampled_from((b"\1" * 1024, bytes(1023) + b"\2", bytes(1024), bytes(1024)))
blocks = st.lists(contents, min_size=1, max_size=8)


@both
@given(blocks, blocks)
def test_what_was_packed_applies_to_the_same_memory(kernels, before, after):
    """Whatever was there before, as long as *known* says so."""
    size = min(len(before), len(after))
    source, target = memory_of(*after[:size]), memory_of(*before[:size])
    out = bytearray(16 * 1024)
    pages = np.arange(size, dtype=np.uint64)
    _, used, zeros = kernels.pack_pages(source, pages, 0, 1024, NAME, True, out)
    rows = np.zeros(size, ROW)
    assert kernels.scan_records(out, 0, used, 1024, size * 1024, NAME, rows) == (used, size)
    known = np.array([any(page) for page in before[:size]], np.uint8)
    assert kernels.apply_records(target, rows, 0, out, 1024, known) == size
    assert target.tobytes() == source.tobytes()
    assert zeros == sum(not any(page) for page in after[:size])


deltas = st.sampled_from((b"", b"\0\1\x90", b"\x05\2ab", b"\xff\x07\x01z", b"\0\2a"))
payloads = st.one_of(
    contents.map(lambda page: (PAGE, page)),
    st.just((ZERO, b"\0")),
    deltas.map(lambda delta: (XBZRLE, delta)),
    st.sampled_from(((COMPRESS, b"x"), (PAGE, b"short"), (PAGE | ZERO, b"\1" * 1024))),
)


@needs_compiled
@given(blocks, st.lists(st.tuples(st.integers(0, 8), payloads), max_size=10), st.integers(0, 3))
def test_twins_apply_alike(content, records, first):
    data = b"".join(payload for _, (_, payload) in records)
    table, position, results = [], 0, []
    for number, (kind, payload) in records:
        table.append((number * 1024 | kind, position, len(payload)))
        position += len(payload)
    for kernels in (compiled, plain):
        memory = memory_of(*content)
        known = np.array([any(page) for page in content], np.uint8)
        done = kernels.apply_records(memory, rows_from(*table), first, data, 1024, known)
        results.append((done, memory.tobytes(), known.tolist()))
    assert results[0] == results[1]
