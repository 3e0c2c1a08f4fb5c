from __future__ import annotations

import pytest
from hypothesis import given

from tests.wire import strategies as some
from tests.wire.feeding import Steps, check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError
from vmferry.wire.bitmap import (
    BitmapBits,
    BitmapComplete,
    BitmapReader,
    BitmapsEnd,
    BitmapStart,
)
from vmferry.wire.layout import BitmapFlag

BOTH = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME
NAME = BitmapFlag.BITMAP_NAME
NONE = BitmapFlag(0)


def body(bodies=2):
    return lambda: Steps(*[BitmapReader().body] * bodies, capacity=2048)


DATA = bytes(range(32)) * 32
DIRTY = b"\3" + bytes(127)
GOLDEN = [
    # As captured: three bitmaps of one node, sent whole.
    (
        BitmapStart("node0", "bmdis", BOTH, 65536, enabled=False, persistent=False),
        "1c 05 6e6f646530 05 626d646973 00010000 00",
    ),
    (
        BitmapStart("node0", "bm1", NAME, 512, enabled=True, persistent=True),
        "14 03 626d31 00000200 03",
    ),
    (
        BitmapStart("node0", "bm0", NAME, 65536, enabled=True, persistent=False),
        "14 03 626d30 00010000 01",
    ),
    (BitmapsEnd(), "01"),
    (
        BitmapBits("node0", "bmdis", NAME, 0, 131072, None),
        "46 05 626d646973 0000000000000000 00020000",
    ),
    (
        BitmapBits("node0", "bm1", NAME, 0, 8192, DATA),
        "44 03 626d31 0000000000000000 00002000 0000000000000400" + DATA.hex(),
    ),
    (
        BitmapBits("node0", "bm1", NONE, 8192, 8192, DATA),
        "40 0000000000002000 00002000 0000000000000400" + DATA.hex(),
    ),
    (
        BitmapBits("node0", "bm0", NAME, 0, 131072, DIRTY),
        "44 03 626d30 0000000000000000 00020000 0000000000000080" + DIRTY.hex(),
    ),
    (BitmapComplete("node0", "bmdis", NAME), "24 05 626d646973"),
    (BitmapComplete("node0", "bm1", NAME), "24 03 626d31"),
    (BitmapComplete("node0", "bm0", NAME), "24 03 626d30"),
    (BitmapsEnd(), "01"),
]


def test_records_are_read_and_written_as_captured():
    data = bytes.fromhex("".join(wire for _, wire in GOLDEN))
    assert b"".join(event.encode() for event, _ in GOLDEN) == data
    assert list(body()().feed(data)) == [event for event, _ in GOLDEN]
    check_round_trip(body(), data)
    check_truncation(body(), data)


@given(some.bitmap_bodies())
def test_any_body_comes_back(events):
    data = b"".join(event.encode() for event in events)
    assert list(body(1)().feed(data)) == events
    assert read(body(1)(), [data[i : i + 100] for i in range(0, len(data), 100)]).written == data


STARTED = BitmapStart("n", "b", BOTH, 65536, enabled=True, persistent=False).encode()
DONE = BitmapComplete("n", "b", NONE).encode()
BITS = "40 0000000000000000"
BAD = [
    # What is wrong, what stands before, the bytes, the error, its text, the offset in the record.
    ("no flag", STARTED, "00", StreamError, "start, bits, complete or end, found 0x00", 0),
    ("zeros of nothing", STARTED, "02", StreamError, "complete or end, found 0x02", 0),
    ("start and complete", STARTED, "30", StreamError, "found 0x30", 0),
    ("start and bits", STARTED, "50", StreamError, "found 0x50", 0),
    ("zeros complete", STARTED, "22", StreamError, "found 0x22", 0),
    ("flags of two bytes", STARTED, "80", StreamError, "found 0x80", 0),
    ("an end with a name", STARTED, "05", StreamError, "found 0x05", 0),
    ("no names", b"", "20", StreamError, "names of node and bitmap in the first record", 0),
    ("no node", b"", "24", StreamError, "names of node and bitmap in the first record", 0),
    ("an empty node", b"", "1c 00", StreamError, "the name of a node as printable", 1),
    ("an empty name", STARTED, "24 00", StreamError, "the name of a bitmap as printable", 1),
    ("a second start", STARTED, "10", StreamError, "each bitmap started once", 0),
    ("another bitmap", STARTED, "24 01 63", StreamError, "a bitmap that was started", 0),
    ("the same of another node", STARTED, "28 01 6d", StreamError, "that was started", 0),
    ("bits after complete", STARTED + DONE, "40", StreamError, "before it was complete", 0),
    ("complete twice", STARTED + DONE, "20", StreamError, "before it was complete", 0),
    ("granularity 0", STARTED, "14 01 63 00000000 00", StreamError, "power of two from 512", 0),
    ("granularity 256", STARTED, "14 01 63 00000100 00", StreamError, "found 256", 0),
    ("granularity 513", STARTED, "14 01 63 00000201 00", StreamError, "found 513", 0),
    ("an unknown flag", STARTED, "14 01 63 00000200 08", StreamError, "from 0 to 7, found 0x08", 0),
    (
        "no sectors",
        STARTED,
        BITS + "00000000",
        StreamError,
        "one or more sectors .* found 0 sectors from 0",
        0,
    ),
    ("an odd start", STARTED, "42 0000000000000001 00000001", StreamError, "multiple of 128", 0),
    ("2^54 sectors", STARTED, "42 003fffffffffff80 00000081", StreamError, "below 2.54", 0),
    ("2^64 - 128", STARTED, "42 ffffffffffffff80 00000001", StreamError, "below 2.54", 0),
    (
        "no bits",
        STARTED,
        BITS + "00000001 " + "00" * 8,
        StreamError,
        "1 to 32 bytes .*, found 0",
        0,
    ),
    (
        "too few bits",
        STARTED,
        BITS + "00020000 " + "00" * 7 + "7f",
        StreamError,
        "expected 128 bytes of bits for 131072 sectors, found 127",
        0,
    ),
    (
        "too many bits",
        STARTED,
        BITS + "00000080 " + "00" * 7 + "21",
        StreamError,
        "1 to 32 bytes of bits for 128 sectors, found 33",
        0,
    ),
    (
        "more than 10 KiB",
        STARTED,
        BITS + "ffffffff 0000000000002801",
        LimitExceeded,
        "at most 10240 bytes of bits, found 10241",
        0,
    ),
    (
        "2^64 - 1 bits",
        STARTED,
        BITS + "ffffffff" + "ff" * 8,
        LimitExceeded,
        "18446744073709551615",
        0,
    ),
]


@pytest.mark.parametrize(
    ("wrong", "before", "wire", "kind", "message", "offset"), BAD, ids=[b[0] for b in BAD]
)
def test_record_is_refused_with(wrong, before, wire, kind, message, offset):
    data = before + bytes.fromhex(wire)
    outcome = read(body()(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert outcome.place.offset == len(before) + offset
    assert read_in_every_way(body(), data).error is not None


def test_error_names_the_bitmap():
    error = read(body()(), [STARTED + b"\x10"], end=False).error
    assert error is not None
    assert error.place.block == "n/b"


def test_too_many_bitmaps_are_refused():
    starts = [
        BitmapStart("n", str(n), BOTH, 512, enabled=True, persistent=False).encode()
        for n in range(4097)
    ]
    outcome = read(body()(), starts, end=False)
    assert isinstance(outcome.error, LimitExceeded)
    assert len(outcome.events) == 4096
    assert outcome.place.offset == sum(map(len, starts[:-1]))
