from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire import strategies as some
from tests.wire.feeding import Steps, check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream
from vmferry.wire.disk import DiskChunk, DiskEnd, DiskProgress, DiskReader

MIB = 1 << 20
NOISE = random.Random(3).randbytes(MIB)  # noqa: S311


def body():
    return Steps(DiskReader().body)


SMALL = [
    (DiskProgress(0), "00 00 00 00 00 00 00 04"),
    (DiskProgress(100), "00 00 00 00 00 00 c8 04"),
    (DiskChunk("dr0", 4096, None), "00 00 00 00 00 20 00 09 03 64 72 30"),
    (DiskChunk("n" * 255, 0, None), "00 00 00 00 00 00 00 09 ff" + "6e" * 255),
    (DiskChunk("d", (1 << 54) - 2048, None), "7f ff ff ff ff f0 00 09 01 64"),
    (DiskEnd(), "00 00 00 00 00 00 00 02"),
]


def test_records_are_read_and_written_as_captured():
    data = bytes.fromhex("".join(wire for _, wire in SMALL))
    assert b"".join(event.encode() for event, _ in SMALL) == data
    assert list(body().feed(data)) == [event for event, _ in SMALL]
    check_round_trip(body, data)
    check_truncation(body, data)


def test_chunk_has_its_mebibyte_behind_the_name():
    chunk = DiskChunk("dr0", 4096, NOISE)
    assert chunk.encode() == bytes.fromhex("0000000000200001 03 647230") + NOISE
    assert chunk.offset == 2 * MIB


@settings(max_examples=10)
@given(st.lists(st.integers(1, MIB + 20), max_size=3))
def test_chunks_come_back_whatever_the_reads(sizes):
    events = [DiskChunk("a", 0, NOISE), DiskChunk("b", 2048, bytes(MIB)), DiskEnd()]
    data = b"".join(event.encode() for event in events)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(data[at : at + size])
        at += size
    outcome = read(body(), [*pieces, data[at:]])
    assert outcome.error is None
    assert outcome.written == data
    assert [event[0] for event in outcome.events] == ["DiskChunk", "DiskChunk", "DiskEnd"]
    assert [event[1]["sector"] for event in outcome.events[:2]] == [0, 2048]


def test_cut_chunk_is_refused_as_cut_off():
    data = DiskChunk("a", 0, NOISE).encode()
    for size in (11, 1000, MIB, len(data) - 1):
        assert isinstance(read(body(), [data[:size]]).error, TruncatedStream)


@given(some.disk_bodies)
def test_any_body_comes_back(events):
    data = b"".join(event.encode() for event in events)
    assert list(body().feed(data)) == events


RECORD = "expected a disk record: chunk, zero chunk, progress of at most 100 %, or end, found"
BAD = [
    ("no flag", "0000000000000000", StreamError, f"{RECORD} the word 0x0000000000000000"),
    ("zeros without a chunk", "0000000000000008", StreamError, RECORD),
    ("chunk and end", "0000000000000003", StreamError, RECORD),
    ("chunk and progress", "0000000000000005", StreamError, RECORD),
    ("an unknown flag", "0000000000000011", StreamError, RECORD),
    ("the highest flag", "0000000000000101", StreamError, RECORD),
    ("an end with a sector", "0000000000100002", StreamError, RECORD),
    ("101 percent", "000000000000ca04", StreamError, RECORD),
    ("2^55 - 1 percent", "fffffffffffffe04", StreamError, RECORD),
    ("a disk without a name", "0000000000000001 00", StreamError, "the name of a disk .* empty"),
    ("half a chunk", "0000000000080001 01 64", StreamError, "a multiple of 2048 .* sector 1024"),
    ("8 EiB", "8000000000000009 01 64", StreamError, "below 8 EiB, found sector 18014398509481984"),
    ("2^55 - 1", "fffffffffffffe09 01 64", StreamError, "found sector 36028797018963967"),
]


@pytest.mark.parametrize(("wrong", "wire", "kind", "message"), BAD, ids=[b[0] for b in BAD])
def test_record_is_refused_with(wrong, wire, kind, message):
    before = DiskChunk("d", 0, None).encode() + DiskProgress(1).encode()
    data = before + bytes.fromhex(wire)
    outcome = read(body(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    # A name is complained of where it stands, 8 bytes behind the start of its record.
    assert outcome.place.offset == len(before) + (8 if "name" in wrong else 0)
    assert read_in_every_way(body, data).error is not None


def test_too_many_disks_are_refused():
    chunks = [DiskChunk(str(n), 0, None) for n in range(1025)]
    data = b"".join(chunk.encode() for chunk in chunks)
    outcome = read(body(), [data], end=False)
    assert isinstance(outcome.error, LimitExceeded)
    assert outcome.events[-1][1]["disk"] == "1023"
    assert outcome.place.offset == len(data) - len(chunks[-1].encode())
