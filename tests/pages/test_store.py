from __future__ import annotations

import errno
import os
import resource
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pages.twins import (
    COMPRESS,
    PAGE,
    PAGE_SIZES,
    XBZRLE,
    ZERO,
    both,
    compiled,
    needs_compiled,
    plain,
    rows_from,
)
from tests.pages.xbzrle import encode

PAGES = 64
ONES = b"\1" * 4096
TWOS = b"\2" * 4096
ZEROS = bytes(4096)


class File:
    """A RAM block's file of its own: as long as its pages, all of them holes."""

    def __init__(self, kernels, page_size=4096, pages=PAGES, directory=None):
        self.kernels = kernels
        self.page_size = page_size
        self.sums = np.zeros(pages, np.uint64)
        self.file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        self.file.truncate(pages * page_size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def store(self, *rows, data=b"", first=0):
        return self.kernels.store_records(
            self.file.fileno(), rows_from(*rows), first, data, self.page_size, self.sums
        )

    def put(self, number, page):
        assert self.store((number * self.page_size | PAGE, 0, len(page)), data=page) == (1, 0)

    def content(self):
        return os.pread(self.file.fileno(), len(self.sums) * self.page_size, 0)

    def page(self, number):
        return os.pread(self.file.fileno(), self.page_size, number * self.page_size)

    def allocated(self):
        return os.fstat(self.file.fileno()).st_blocks * 512

    def sums_match(self):
        sums = np.zeros_like(self.sums)
        plain.page_sums(self.content(), self.page_size, sums)
        return bool((sums == self.sums).all())


@pytest.fixture(params=["plain", "compiled"])
def file(request):
    if request.param == "compiled" and compiled is None:
        pytest.skip("the kernels are not compiled")
    with File(plain if request.param == "plain" else compiled) as file:
        yield file


def test_pages_go_to_their_offsets(file):
    rows = [(0x2000 | PAGE, 4096, 4096), (0x0000 | PAGE, 0, 4096), (0x3000 | PAGE, 0, 4096)]
    assert file.store(*rows, data=ONES + TWOS) == (3, 0)
    assert file.content()[: 5 * 4096] == ONES + ZEROS + TWOS + ONES + ZEROS
    assert file.sums_match()


def test_zero_pages_of_either_form_stay_holes(file):
    rows = [(n * 4096 | (PAGE if n % 2 else ZERO), 0, 4096 if n % 2 else 1) for n in range(PAGES)]
    assert file.store(*rows, data=ZEROS) == (PAGES, 0)
    assert file.allocated() == 0
    assert not file.sums.any()


@needs_compiled
def test_page_that_becomes_zero_becomes_a_hole():
    with File(compiled, directory="/var/tmp") as file:
        for number in range(PAGES):
            file.put(number, ONES)
        before = file.allocated()
        assert file.store(*((n * 4096 | ZERO, 0, 1) for n in range(PAGES))) == (PAGES, 0)
        assert file.allocated() <= before - PAGES * 4096
        assert file.content() == bytes(PAGES * 4096)


def test_zero_after_data_reads_as_zero(file):
    for zero in ((0x1000 | ZERO, 0, 1), (0x1000 | PAGE, 4096, 4096)):
        assert file.store((0x1000 | PAGE, 0, 4096), zero, data=ONES + ZEROS) == (2, 0)
        assert file.page(1) == ZEROS
        assert file.sums_match()


def test_last_of_several_records_of_a_page_wins(file):
    rows = [
        (0x1000 | PAGE, 0, 4096),
        (0x2000 | PAGE, 0, 4096),
        (0x1000 | PAGE, 4096, 4096),
        (0x2000 | ZERO, 0, 1),
        (0x2000 | PAGE, 4096, 4096),
        (0x2000 | PAGE, 0, 4096),
    ]
    assert file.store(*rows, data=ONES + TWOS) == (6, 0)
    assert file.content()[: 4 * 4096] == ZEROS + TWOS + ONES + ZEROS
    assert file.sums_match()


def test_xbzrle_patches_the_page_that_is_there(file):
    new = ONES[:100] + b"\7\7" + ONES[102:]
    delta = encode(ONES, new)
    rows = [(0x1000 | PAGE, 0, 4096), (0x1000 | XBZRLE, 4096, len(delta))]
    assert file.store(*rows, data=ONES + delta) == (2, 0)
    assert file.page(1) == new
    assert file.sums_match()


def test_xbzrle_patches_a_hole(file):
    assert file.store((0x1000 | XBZRLE, 0, 3), data=b"\0\1\x90") == (1, 0)
    assert file.page(1) == b"\x90" + ZEROS[1:]
    assert file.sums_match()


def test_xbzrle_of_nothing_changes_nothing(file):
    file.put(0, ONES)
    assert file.store((XBZRLE, 0, 0), (0x1000 | XBZRLE, 0, 0)) == (2, 0)
    assert file.content()[:8192] == ONES + ZEROS
    assert file.sums_match()


def test_xbzrle_that_leaves_zeros_makes_a_zero_page(file):
    last_byte = ZEROS[:-1] + b"\1"
    file.put(0, last_byte)
    delta = encode(last_byte, ZEROS)
    assert file.store((XBZRLE, 0, len(delta)), data=delta) == (1, 0)
    assert file.sums[0] == 0
    assert file.page(0) == ZEROS


# Why a row is not stored, and the row; the data has two pages.
BAD_ROWS = [
    ("a page behind the block", (PAGES * 4096 | PAGE, 0, 4096)),
    ("an offset of nearly 2^64", ((1 << 64) - 4096 | PAGE, 0, 4096)),
    ("a payload behind the data", (PAGE, 8193, 4096)),
    ("a payload that ends behind the data", (PAGE, 4097, 4096)),
    ("a payload at nearly 2^64", (PAGE, (1 << 64) - 1, 4096)),
    ("a page that is too short", (PAGE, 8191, 1)),
    ("a page that is empty", (PAGE, 0, 0)),
    ("a compressed page", (COMPRESS, 0, 52)),
    ("no kind", (0, 0, 4096)),
    ("two kinds", (PAGE | ZERO, 0, 4096)),
    ("a broken xbzrle encoding", (XBZRLE, 0, 2)),
    ("xbzrle behind the data", (XBZRLE, 8190, 3)),
]


@pytest.mark.parametrize(("why", "row"), BAD_ROWS, ids=[b[0] for b in BAD_ROWS])
def test_store_stops_before(file, why, row):
    rows = [(0x1000 | PAGE, 0, 4096), (0x2000 | PAGE, 0, 4096), row, (0x3000 | PAGE, 0, 4096)]
    assert file.store(*rows, data=ONES + TWOS) == (2, 0)
    assert file.content()[: 4 * 4096] == ZEROS + ONES + ONES + ZEROS
    assert file.sums_match()
    assert file.store(*rows, data=ONES + TWOS, first=3) == (4, 0)


def test_store_of_no_rows_does_nothing(file):
    assert file.store() == (0, 0)
    assert file.store((PAGE, 0, 4096), data=ONES, first=1) == (1, 0)


@both
def test_more_adjacent_pages_than_one_write_takes_are_written(kernels):
    with File(kernels, 1024, pages=1400) as file:
        rows = [(n * 1024 | PAGE, n % 2 * 1024, 1024) for n in range(1400)]
        assert file.store(*rows, data=ONES[:1024] + TWOS[:1024]) == (1400, 0)
        assert file.content() == (ONES[:1024] + TWOS[:1024]) * 700


@both
@pytest.mark.parametrize("page_size", [*PAGE_SIZES, 1 << 20])
def test_pages_of_every_size_are_stored(kernels, page_size):
    one, two = b"\1" * page_size, b"\2" * page_size
    with File(kernels, page_size, pages=4) as file:
        assert file.store(
            (page_size | PAGE, 0, page_size),
            (2 * page_size | PAGE, page_size, page_size),
            (3 * page_size | PAGE, 0, page_size),
            (3 * page_size | ZERO, 0, 1),
            data=one + two,
        ) == (4, 0)
        assert file.content() == bytes(page_size) + one + two + bytes(page_size)
        assert file.sums_match()


@both
def test_full_device_gives_its_errno(kernels):
    with Path("/dev/full").open("r+b", buffering=0) as full:
        sums = np.zeros(4, np.uint64)
        rows = rows_from((ZERO, 0, 1), (0x1000 | PAGE, 0, 4096), (0x2000 | PAGE, 0, 4096))
        done = kernels.store_records(full.fileno(), rows, 0, ONES, 4096, sums)
    assert done == (1, errno.ENOSPC)


@both
def test_file_that_must_not_grow_gives_its_errno(kernels):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rows = rows_from(*((n * 4096 | PAGE, 0, 4096) for n in range(PAGES)))
    with File(kernels) as file:
        file.file.truncate(0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 4096, limits[1]))
        try:
            done, error = kernels.store_records(file.file.fileno(), rows, 0, ONES, 4096, file.sums)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error == errno.EFBIG
    assert done <= 10


@both
def test_closed_file_gives_its_errno(kernels):
    sums = np.zeros(1, np.uint64)
    for kind, length in ((PAGE, 4096), (XBZRLE, 3)):
        rows = rows_from((kind, 0, length))
        done = kernels.store_records(-1, rows, 0, ONES, 4096, sums)
        assert done == (0, errno.EBADF)


@both
def test_file_that_is_too_short_for_xbzrle_gives_an_errno(kernels):
    with File(kernels) as file:
        file.file.truncate(100)
        assert file.store((XBZRLE, 0, 3), data=b"\0\1\x90") == (0, errno.EIO)


contents = st.sampled_from((ONES[:1024], TWOS[:1024], ZEROS[:1024], bytes(range(256)) * 4))
deltas = st.sampled_from((b"", b"\0\1\x90", b"\0\1\0", b"\x05\2ab", b"\xff\x07\x01z", b"\0\2a"))
pages = contents.map(lambda page: (PAGE, page))
zeros = st.just((ZERO, b"\0"))
patches = deltas.map(lambda delta: (XBZRLE, delta))
broken = st.sampled_from(((COMPRESS, b"x"), (PAGE, b"short"), (PAGE | ZERO, ONES[:1024])))
records = st.one_of(pages, pages, zeros, patches, broken)


@needs_compiled
@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), records), max_size=12), st.integers(0, 3))
def test_twins_store_alike(rows, first):
    data = b"".join(payload for _, (_, payload) in rows)
    table, position = [], 0
    for number, (kind, payload) in rows:
        table.append((number * 1024 | kind, position, len(payload)))
        position += len(payload)
    results = []
    for kernels in (compiled, plain):
        with File(kernels, 1024, pages=8) as file:
            done = file.store(*table, data=data, first=min(first, len(rows)))
            results.append((done, file.content(), file.sums.tolist(), file.sums_match()))
    assert results[0] == results[1]
    assert results[0][3]
