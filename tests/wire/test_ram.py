from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from tests.pages.twins import COMPRESS, CONTINUE, PAGE, XBZRLE, ZERO, record
from tests.wire import strategies as some
from tests.wire.feeding import Steps, check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError
from vmferry.pages import ROW
from vmferry.wire.buffer import encode_name
from vmferry.wire.ram import BATCH, RamBlock, RamBlocks, RamEnd, RamFlush, RamPages, RamReader

K = 1024
END = "00 00 00 00 00 00 00 10"
FLUSH = "00 00 00 00 00 00 02 00"
BLOCKS = RamBlocks((RamBlock("a", 4 * K), RamBlock("bb", 2 * K)))
LIST = "00 00 00 00 00 00 18 04  01 61 00 00 00 00 00 00 10 00  02 62 62 00 00 00 00 00 00 08 00"
START = bytes.fromhex(LIST + END)


def body(page_size=K, capacity=4 * K, bodies=1, **options):
    """Makes readers of *bodies* bodies, one behind the other."""
    options.setdefault("max_ram", 1 << 40)
    return lambda: Steps(*[RamReader(page_size, **options).body] * bodies, capacity=capacity)


def test_block_list_is_read_and_written_as_captured():
    blocks = RamBlocks(
        (
            RamBlock("pc.ram", 0x2000000),
            RamBlock("/rom@etc/acpi/tables", 0x20000),
            RamBlock("pc.bios", 0x40000),
            RamBlock("pc.rom", 0x20000),
            RamBlock("/rom@etc/table-loader", 0x1000),
            RamBlock("/rom@etc/acpi/rsdp", 0x1000),
        )
    )
    data = bytes.fromhex(
        "00 00 00 00 02 08 20 04"
        "06 70632e72616d 00 00 00 00 02 00 00 00"
        "14 2f726f6d406574632f616370692f7461626c6573 00 00 00 00 00 02 00 00"
        "07 70632e62696f73 00 00 00 00 00 04 00 00"
        "06 70632e726f6d 00 00 00 00 00 02 00 00"
        "15 2f726f6d406574632f7461626c652d6c6f61646572 00 00 00 00 00 00 10 00"
        "12 2f726f6d406574632f616370692f72736470 00 00 00 00 00 00 10 00"
        "00 00 00 00 00 00 00 10"
    )
    assert blocks.encode() + RamEnd().encode() == data
    make = body(4096)
    assert list(make().feed(data)) == [blocks, RamEnd()]
    check_round_trip(make, data)
    check_truncation(make, data)


# Optional fields of the entries: options of the reader, the blocks, the bytes.
OPTIONAL = [
    (
        {"huge_pages": True},
        (RamBlock("m0", 0x4000000, page_size=0x200000), RamBlock("b", 0x1000)),
        "0000000004001004 02 6d30 0000000004000000 0000000000200000 01 62 0000000000001000",
    ),
    (
        {"huge_pages": True},
        (RamBlock("b", 0x1000), RamBlock("m0", 0x4000000, page_size=0x200000)),
        "0000000004001004 01 62 0000000000001000 02 6d30 0000000004000000 0000000000200000",
    ),
    (
        {"huge_pages": True},
        (RamBlock("b", 0x1000), RamBlock("c", 0x1000)),
        "0000000000002004 01 62 0000000000001000 01 63 0000000000001000",
    ),
    (
        {"addresses": True},
        (RamBlock("m0", 0x2000000, address=0), RamBlock("pc.bios", 0x40000, address=0xFFFC0000)),
        (
            "0000000002040004 02 6d30 0000000002000000 0000000000000000"
            "07 70632e62696f73 0000000000040000 00000000fffc0000"
        ),
    ),
]


@pytest.mark.parametrize(("options", "blocks", "wire"), OPTIONAL)
def test_optional_fields_of_the_list_are_read_and_written(options, blocks, wire):
    data = bytes.fromhex(wire + END)
    make = body(4096, **options)
    assert list(make().feed(data)) == [RamBlocks(blocks), RamEnd()]
    check_round_trip(make, data)
    check_truncation(make, data)


# A record of each kind, in the order of one stream: the bytes, and what they say.
RECORDS = [
    (record(PAGE, 0, b"\x53\xff" * 512, b"\1a"), ("a", 0x008, b"\x53\xff" * 512)),
    (bytes.fromhex("00 00 00 00 00 00 04 22 00"), ("a", 0x422, b"\0")),
    (bytes.fromhex("00 00 00 00 00 00 08 60 01 00 03 00 01 90"), ("a", 0x860, b"\0\1\x90")),
    (record(COMPRESS, 3 * K, b"z" * 52), ("a", 0xD20, b"z" * 52)),
    (record(ZERO, 0, b"\0", b"\2bb"), ("bb", 0x002, b"\0")),
    (record(XBZRLE, K, b"", b"\2bb"), ("bb", 0x440, b"")),
    (record(COMPRESS, 0, b"", b"\1a"), ("a", 0x100, b"")),
    (record(PAGE, 0, bytes(K), b"\1a"), ("a", 0x008, bytes(K))),
]


def test_every_kind_of_record_comes_back():
    pages = b"".join(wire for wire, _ in RECORDS)
    events = check_round_trip(body(), START[:-8] + pages + bytes.fromhex(END))
    found = [event[2:] for event in events if event[0] == "page"]
    assert found == [said for _, said in RECORDS]


def test_records_cut_short_are_refused_as_cut_off():
    pages = b"".join(wire for wire, _ in RECORDS)
    check_truncation(body(), START[:-8] + pages + bytes.fromhex(END))


def test_block_stays_the_same_from_body_to_body():
    data = START + RECORDS[0][0] + bytes.fromhex(END) + RECORDS[1][0] + bytes.fromhex(FLUSH + END)
    events = check_round_trip(body(bodies=3), data)
    assert [event[0] for event in events] == [
        *("RamBlocks", "RamEnd", "page", "RamEnd", "page", "RamFlush", "RamEnd")
    ]
    assert events[4][2] == "a"


def test_pages_move_in_batches_of_one_block():
    pages = [record(PAGE, n % 4 * K, b"x" * K, None if n else b"\1a") for n in range(600)]
    make = body(capacity=1 << 20)
    batches = [
        len(event.rows)
        for event in make().feed(START[:-8] + b"".join(pages) + bytes.fromhex(END))
        if isinstance(event, RamPages)
    ]
    assert batches == [600]


def test_batch_has_a_limit():
    pages = record(ZERO, 0, b"\0", b"\1a") + record(ZERO, K, b"\0") * (2 * BATCH)
    batches = [
        event
        for event in body(capacity=1 << 20)().feed(START[:-8] + pages + bytes.fromhex(END))
        if isinstance(event, RamPages)
    ]
    assert [len(batch.rows) for batch in batches] == [BATCH, BATCH, 1]
    assert {batch.block.name for batch in batches} == {"a"}


def test_rows_of_a_batch_stay_when_the_next_is_read():
    first = record(ZERO, 0, b"\0", b"\1a")
    reader = body(bodies=2)()
    batch = next(e for e in reader.feed(START[:-8] + first) if isinstance(e, RamPages))
    list(reader.feed(record(ZERO, 3 * K, b"\0")))
    assert batch.rows["word"].tolist() == [ZERO]


def test_batch_tells_kinds_and_offsets():
    rows = np.zeros(3, ROW)
    rows["word"] = (5 * K | PAGE | CONTINUE, XBZRLE, 7 * K | ZERO)
    batch = RamPages(RamBlock("a", 8 * K), rows, memoryview(b""), K)
    assert batch.kinds.tolist() == [PAGE, XBZRLE, ZERO]
    assert batch.offsets.tolist() == [5 * K, 0, 7 * K]


@pytest.mark.parametrize("page_size", [1024, 4096, 8192, 16384, 65536])
def test_pages_of_every_size_come_back(page_size):
    blocks = RamBlocks((RamBlock("m", 4 * page_size),))
    data = blocks.encode() + b"".join(
        [
            record(PAGE, 0, b"p" * page_size, b"\1m"),
            record(ZERO, page_size, b"\0"),
            record(XBZRLE, 2 * page_size, b"x" * min(page_size, 65535)),
            record(COMPRESS, 3 * page_size, b"z" * (page_size + 13)),
            RamFlush().encode(),
            RamEnd().encode(),
        ]
    )
    make = body(page_size)
    for pieces in ([data], [data[i : i + 997] for i in range(0, len(data), 997)]):
        outcome = read(make(), pieces)
        assert outcome.error is None
        assert outcome.written == data
        assert len(outcome.events) == 7


def test_block_name_of_255_bytes_comes_back():
    name = "ü" * 127 + "n"
    raw = encode_name(name)
    data = RamBlocks((RamBlock(name, K),)).encode() + record(ZERO, 0, b"\0", raw)
    assert check_round_trip(body(), data + bytes.fromhex(END))[1][2] == name


@settings(max_examples=60)
@given(some.ram_bodies())
def test_any_body_comes_back(case):
    page_size, data, expected = case
    make = body(page_size, capacity=page_size)
    whole = read(make(), [data])
    assert whole.error is None
    assert whole.written == data
    assert [event[2:] for event in whole.events if event[0] == "page"] == expected
    pieces = [data[i : i + 700] for i in range(0, len(data), 700)]
    assert read(make(), pieces).result() == whole.result()


BAD_LISTS = [
    # What is wrong, the bytes, the error, its text, its offset.
    ("no block", "0000000000000004", StreamError, "one RAM block or more, found none", 0),
    ("more than allowed", "0000010000000404", LimitExceeded, "allow more with --max-ram", 0),
    ("2^64 - 1 KiB", "fffffffffffffc04", LimitExceeded, "found 18446744073709550592", 0),
    (
        "a name of no bytes",
        "0000000000000404 00",
        StreamError,
        "a RAM block as printable.*empty",
        8,
    ),
    ("a name with NUL", "0000000000000404 02 6100", StreamError, r'found "a\\x00"', 8),
    (
        "a block of 0 bytes",
        "0000000000000404 01 61 0000000000000000",
        StreamError,
        "whole pages of 1024 bytes, at most 0x400 bytes of them .*, found 0x0 bytes",
        8,
    ),
    ("a part of a page", "0000000000000804 01 61 0000000000000401", StreamError, "found 0x401", 8),
    (
        "more than the total",
        "0000000000000c04 01 61 0000000000000800 01 62 0000000000000800",
        StreamError,
        r"most 0x400 bytes of them \(the lengths add up to the total\), found 0x800 bytes",
        18,
    ),
    ("2^64 - 1", "0000000000000404 01 61 ffffffffffffffff", StreamError, "f{16} bytes", 8),
    (
        "a block twice",
        "0000000000000c04 01 61 0000000000000400 01 61 0000000000000400",
        StreamError,
        'each RAM block once, found "a" again',
        18,
    ),
    ("a second list", LIST + LIST[:24], StreamError, "one list of RAM blocks, found a second", 29),
]


@pytest.mark.parametrize(
    ("wrong", "wire", "kind", "message", "offset"), BAD_LISTS, ids=[b[0] for b in BAD_LISTS]
)
def test_block_list_is_refused_with(wrong, wire, kind, message, offset):
    refuse(body(), bytes.fromhex(wire), kind, message, offset)


def refuse(make, data, kind, message, offset):
    outcome = read(make(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert outcome.place.offset == offset
    again = read_in_every_way(make, data)
    assert again.error is not None
    return outcome


def test_page_size_that_is_no_power_of_two_is_refused():
    wire = "0000000000000804 01 61 0000000000000400 0000000000201000"
    refuse(
        body(huge_pages=True),
        bytes.fromhex(wire),
        StreamError,
        "a power of two as page size, found 0x201000",
        18,
    )


def test_too_many_blocks_are_refused():
    names = [encode_name(str(n)) + (K).to_bytes(8) for n in range(4096)]
    data = (4097 * K | 4).to_bytes(8) + b"".join(names)
    outcome = read(body()(), [data], end=False)
    assert isinstance(outcome.error, LimitExceeded)
    assert "at most 4096 RAM blocks" in str(outcome.error)
    allowed = (4096 * K | 4).to_bytes(8) + b"".join(names) + bytes.fromhex(END)
    assert read(body()(), [allowed]).error is None


BAD_RECORDS = [
    # What is wrong, the bytes, the error, its text, the block it names; "a" is current before.
    ("no flag", "0000000000000400", StreamError, "found the word 0x0000000000000400", None),
    ("the flag FULL", "0000000000000001", StreamError, "this record is obsolete", None),
    ("the flag HOOK", "0000000000000080", StreamError, "hooks belong to RDMA", None),
    ("zero and page", "0000000000000042 01 61", StreamError, "a record of guest memory", None),
    ("page and xbzrle", "0000000000000068", StreamError, "word 0x0000000000000068", None),
    ("page and end", "0000000000000038", StreamError, "a record of guest memory", None),
    ("sizes and continue", "0000000000000024", StreamError, "a record of guest memory", None),
    ("an end that continues", "0000000000000030", StreamError, "a record of guest memory", None),
    ("an end with an offset", "0000000000000410", StreamError, "a record of guest memory", None),
    ("a flush with an offset", "0000000000000600", StreamError, "a record of guest memory", None),
    ("continue alone", "0000000000000020", StreamError, "a record of guest memory", None),
    ("an unlisted block", "0000000000000008 01 63", StreamError, 'before, found "c"', None),
    ("no block's name", "0000000000000008 00", StreamError, 'before, found ""', None),
    ("a longer name", "0000000000000008 02 6161", StreamError, 'found "aa"', None),
    ("a name up to NUL", "0000000000000008 02 6100", StreamError, r'found "a\\x00"', None),
    ("a name of junk", "0000000000000008 01 ff", StreamError, r'found "\\\\xff"', None),
    ("a page behind the block", "0000000000001028", StreamError, "below 0x1000.*at 0x1000", "a"),
    ("one behind the other", "0000000000000802 02 6262", StreamError, "below 0x800", "bb"),
    ("2^64 - 1 KiB", "fffffffffffffc28", StreamError, "one at 0xfffffffffffffc00", "a"),
    ("a fill of 0xff", "0000000000000022 ff", StreamError, "filled with 0, .* with 0xff", "a"),
    ("xbzrle encoding 2", "0000000000000060 02 0001", StreamError, "encoding 1.* encoding 2", "a"),
    ("xbzrle above a page", "0000000000000060 01 0401", LimitExceeded, "at most 1024 .*1025", "a"),
    ("compressed above the bound", "0000000000000120 0000040e", LimitExceeded, "1037 .*1038", "a"),
    ("compressed of 4 GiB", "0000000000000120 ffffffff", LimitExceeded, "found 4294967295", "a"),
]


@pytest.mark.parametrize(
    ("wrong", "wire", "kind", "message", "block"), BAD_RECORDS, ids=[b[0] for b in BAD_RECORDS]
)
def test_record_is_refused_with(wrong, wire, kind, message, block):
    before = START[:-8] + record(ZERO, 0, b"\0", b"\1a")
    outcome = refuse(body(), before + bytes.fromhex(wire), kind, message, len(before))
    assert outcome.place.block == block
    assert outcome.written == before


def test_page_before_the_block_list_is_refused():
    refuse(body(), bytes.fromhex("0000000000000008 01 61"), StreamError, "the name of a RAM", 0)
    refuse(body(), bytes.fromhex("0000000000000028"), StreamError, "a page that names its", 0)


def test_first_page_that_continues_is_refused():
    message = "a page that names its RAM block, found one that continues the block before"
    refuse(body(), START[:-8] + bytes.fromhex("0000000000000028"), StreamError, message, 29)


def test_name_that_is_no_text_is_not_taken_for_a_block():
    blocks = RamBlocks((RamBlock("\N{REPLACEMENT CHARACTER}", K),)).encode()
    refuse(body(), blocks + bytes.fromhex("0000000000000008 01 ff"), StreamError, "before", 20)


def test_xbzrle_in_postcopy_is_refused():
    before = START[:-8] + record(ZERO, 0, b"\0", b"\1a") + record(ZERO, K, b"\0")
    delta = record(XBZRLE, K, b"\0\1\x90")
    message = "expected a whole page, in postcopy, found an XBZRLE page"
    for pages in (delta + delta, delta):
        outcome = refuse(body(postcopy=True), before + pages, StreamError, message, len(before))
        assert outcome.written == before
    assert read(body()(), [before + delta + bytes.fromhex(END)]).error is None
