from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.twins import (
    COMPRESS,
    CONTINUE,
    PAGE,
    PAGE_SIZES,
    XBZRLE,
    ZERO,
    both,
    compiled,
    needs_compiled,
    plain,
    record,
    rows_from,
)
from vmferry.pages import ROW, compress_bound

NAME = b"\x06pc.ram"
SIZE = 1 << 20
FULL = bytes(range(256)) * 16


def scan(kernels, data, *, name=NAME, page_size=4096, block_size=SIZE, capacity=64):
    rows = np.zeros(capacity, ROW)
    stop, count = kernels.scan_records(data, 0, len(data), page_size, block_size, name, rows)
    return stop, [tuple(row)[:3] for row in rows[:count].tolist()]


@both
def test_each_kind_of_record_gives_a_row(kernels):
    records = [
        record(PAGE, 0, FULL, NAME),
        record(ZERO, 0x1000, b"\0"),
        record(XBZRLE, 0x2000, b"\x00\x01\x90"),
        record(COMPRESS, 0x3000, b"z" * 52),
        record(XBZRLE, 0x4000, b"", NAME),
        record(PAGE, SIZE - 4096, FULL),
    ]
    stop, rows = scan(kernels, b"".join(records))
    assert stop == sum(map(len, records))
    assert rows == [
        (0x0008, 15, 4096),
        (0x1022, 4119, 1),
        (0x2060, 4131, 3),
        (0x3120, 4146, 52),
        (0x4040, 4216, 0),
        (0xFF028, 4224, 4096),
    ]


good = record(ZERO, 0, b"\0")

# Why a scan stops before the record, and the record.
STOPS = [
    ("another block", record(PAGE, 0, FULL, b"\x06pc.rom")),
    ("a name that is longer", record(PAGE, 0, FULL, b"\x07pc.ram2")),
    ("a name that is shorter", record(PAGE, 0, FULL, b"\x05pc.ra")),
    ("no page: end", (0x10).to_bytes(8) + bytes(8)),
    ("no page: flush", (0x200).to_bytes(8) + bytes(8)),
    ("no page: sizes", (0x4).to_bytes(8) + bytes(8)),
    ("no flag", bytes(16)),
    ("two kinds", record(ZERO | PAGE, 0, FULL)),
    ("an unknown flag beside", record(ZERO | 0x400, 0, b"\0")),
    ("a page behind the block", record(ZERO, SIZE, b"\0")),
    ("an offset of nearly 2^64", record(ZERO, (1 << 64) - 4096, b"\0")),
    ("a zero page of another byte", record(ZERO, 0, b"\1")),
    ("another xbzrle encoding", (0x60).to_bytes(8) + b"\2\0\1\0"),
    ("xbzrle longer than a page", record(XBZRLE, 0, bytes(4097))),
    ("compressed above the bound", record(COMPRESS, 0, bytes(compress_bound(4096) + 1))),
    ("compressed of 4 GiB", (0x120).to_bytes(8) + b"\xff" * 4 + bytes(9000)),
    ("a cut page", record(PAGE, 0, FULL)[:-1]),
    ("a cut word", record(PAGE, 0, FULL)[:7]),
    ("a cut name", record(PAGE, 0, FULL, NAME)[:12]),
    ("a cut xbzrle head", record(XBZRLE, 0, b"abc")[:10]),
    ("a cut compressed head", record(COMPRESS, 0, b"abc")[:11]),
    ("a cut zero page", record(ZERO, 0, b"\0")[:8]),
]


@both
@pytest.mark.parametrize(("why", "bad"), STOPS, ids=[s[0] for s in STOPS])
def test_scan_stops_before(kernels, why, bad):
    assert scan(kernels, good + bad) == (len(good), [(0x22, 8, 1)])
    assert scan(kernels, bad) == (0, [])


@both
def test_longest_payloads_are_scanned(kernels):
    wire = record(XBZRLE, 0, bytes(4096)) + record(COMPRESS, 0, bytes(compress_bound(4096)))
    assert [row[2] for row in scan(kernels, wire)[1]] == [4096, 4110]


@both
def test_scan_fills_no_more_rows_than_there_are(kernels):
    assert scan(kernels, good * 5, capacity=3)[0] == 3 * len(good)


@both
def test_block_of_less_than_a_page_has_none(kernels):
    assert scan(kernels, good, block_size=4095) == (0, [])


@both
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_flags_end_where_the_page_does(kernels, page_size):
    wire = b"".join(record(ZERO, at, b"\0") for at in range(0, SIZE, page_size))
    stop, rows = scan(kernels, wire, page_size=page_size, capacity=2048)
    assert stop == len(wire)
    assert len(rows) == SIZE // page_size
    odd = record(ZERO, page_size // 2 if page_size > 1024 else 0x200, b"\0")
    assert scan(kernels, odd, page_size=page_size) == (0, [])


@both
def test_name_of_255_bytes_is_compared_whole(kernels):
    name = b"\xff" + b"n" * 255
    assert len(scan(kernels, record(ZERO, 0, b"\0", name), name=name)[1]) == 1
    assert scan(kernels, record(ZERO, 0, b"\0", name[:-1] + b"m"), name=name)[1] == []


@st.composite
def wires(draw):
    """Records of one block, now and then with a byte changed or the end cut off."""
    page_size = draw(st.sampled_from((1024, 4096)))
    names = st.sampled_from((None, None, None, NAME, b"\x06pc.rom"))
    kinds = st.sampled_from((ZERO, ZERO, PAGE, XBZRLE, COMPRESS, ZERO | PAGE, 0x10))
    out = bytearray()
    for _ in range(draw(st.integers(0, 8))):
        kind = draw(kinds)
        size = {ZERO: 1, PAGE: page_size}.get(kind) or draw(st.integers(0, page_size + 20))
        payload = bytes([draw(st.integers(0, 255)) if kind != ZERO else 0]) * size
        out += record(kind, draw(st.integers(0, 17)) * page_size, payload, draw(names))
    if out and draw(st.booleans()):
        out[draw(st.integers(0, len(out) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(out))) if draw(st.booleans()) else len(out)
    return page_size, bytes(out), cut


@needs_compiled
@given(wires(), st.integers(0, 9), st.integers(1, 9))
def test_twins_scan_alike(wire, start, capacity):
    page_size, data, stop = wire
    tables = []
    for kernels in (compiled, plain):
        rows = np.zeros(capacity, ROW)
        found = kernels.scan_records(
            data, min(start, stop), stop, page_size, 16 * page_size, NAME, rows
        )
        tables.append((found, rows[: found[1]].tolist()))
    assert tables[0] == tables[1]


@both
@given(wires())
def test_what_was_scanned_packs_to_the_same_bytes(kernels, wire):
    page_size, data, stop = wire
    rows = np.zeros(16, ROW)
    end, count = kernels.scan_records(data, 0, stop, page_size, 16 * page_size, NAME, rows)
    out = bytearray(end + 1)
    assert kernels.pack_records(rows[:count], 0, data, page_size, NAME, out) == (count, end)
    assert out[:end] == data[:end]


@both
def test_pack_goes_on_where_the_room_ended(kernels):
    wire = record(PAGE, 0, FULL, NAME) + good * 3
    rows = np.zeros(4, ROW)
    kernels.scan_records(wire, 0, len(wire), 4096, SIZE, NAME, rows)
    out, first = b"", 0
    while first < len(rows):
        room = bytearray(len(NAME) + 8 + 4096)
        first, size = kernels.pack_records(rows, first, wire, 4096, NAME, room)
        out += room[:size]
    assert out == wire


@both
def test_pack_without_room_writes_nothing(kernels):
    rows = rows_from((ZERO | CONTINUE, 0, 1))
    assert kernels.pack_records(rows, 0, b"", 4096, NAME, bytearray(8)) == (0, 0)
    assert kernels.pack_records(rows, 0, b"", 4096, NAME, bytearray()) == (0, 0)
    assert kernels.pack_records(rows, 1, b"", 4096, NAME, bytearray(8)) == (1, 0)


# What is wrong with a row, and the row; the data has 8192 bytes.
BAD_ROWS = [
    ("a page that starts behind the data", (PAGE | CONTINUE, 8193, 4096)),
    ("a page that ends behind the data", (PAGE | CONTINUE, 4097, 4096)),
    ("a position of nearly 2^64", (PAGE | CONTINUE, (1 << 64) - 1, 4096)),
    ("a page of another length", (PAGE | CONTINUE, 0, 4095)),
    ("a zero page of another length", (ZERO | CONTINUE, 0, 2)),
    ("xbzrle longer than a page", (XBZRLE | CONTINUE, 0, 4097)),
    ("compressed above the bound", (COMPRESS | CONTINUE, 0, 4111)),
    ("no kind", (CONTINUE, 0, 1)),
    ("two kinds", (PAGE | ZERO | CONTINUE, 0, 4096)),
]


@both
@pytest.mark.parametrize(("wrong", "row"), BAD_ROWS, ids=[b[0] for b in BAD_ROWS])
def test_pack_refuses_a_row_with(kernels, wrong, row):
    with pytest.raises(ValueError, match="row"):
        kernels.pack_records(rows_from(row), 0, bytes(8192), 4096, NAME, bytearray(20000))


words = st.sampled_from((ZERO, PAGE, XBZRLE, COMPRESS, 0, PAGE | ZERO, PAGE | 0x400)).flatmap(
    lambda kind: st.sampled_from((kind, kind | CONTINUE, kind | 0x7000))
)
lengths = st.sampled_from((0, 1, 3, 1024, 1025, 1037, 1038, 4096))
some_rows = st.lists(st.tuples(words, st.sampled_from((0, 5, 3000, 1 << 63)), lengths), max_size=5)


@needs_compiled
@given(some_rows, st.integers(0, 5000))
def test_twins_pack_alike(rows, room):
    table, data, results = rows_from(*rows), bytes(range(200)) * 20, []
    for kernels in (compiled, plain):
        out = bytearray(room)
        try:
            result = kernels.pack_records(table, 0, data, 1024, NAME, out)
            results.append((result, out[: result[1]]))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
