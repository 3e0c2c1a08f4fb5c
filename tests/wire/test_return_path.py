from __future__ import annotations

import pytest
from hypothesis import given

from tests.wire import strategies as some
from tests.wire.feeding import check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError
from vmferry.wire.return_path import (
    HavePages,
    Pong,
    RequestPages,
    ResumeAck,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)


def path():
    return ReturnPathReader(max_bitmap=2048)


GOLDEN = [
    (Shut(0), "0001 0004 00000000"),
    (Shut(1), "0001 0004 00000001"),
    (Pong(4), "0002 0004 00000004"),
    (
        RequestPages(0x23D8000, 0x1000, "pc.ram"),
        "0003 0013 00000000023d8000 00001000 06 70632e72616d",
    ),
    (RequestPages(0, 4096, "n" * 255), "0003 010c 0000000000000000 00001000 ff" + "6e" * 255),
    (RequestPages(0x23E2000, 0x1000), "0004 000c 00000000023e2000 00001000"),
    (
        HavePages("pc.ram", b"\x28" + bytes(7)),
        "0005 0007 06 70632e72616d 0000000000000008 2800000000000000 0123456789abcdef",
    ),
    (ResumeAck(), "0006 0004 00000001"),
    (SwitchoverAck(), "0007 0000"),
]


@pytest.mark.parametrize(("event", "wire"), GOLDEN, ids=[type(g[0]).__name__ for g in GOLDEN])
def test_message_is_read_and_written_as_captured(event, wire):
    data = bytes.fromhex(wire)
    assert event.encode() == data
    assert list(path().feed(data)) == [event]
    check_truncation(path, data)


def test_messages_come_back_one_behind_the_other():
    data = bytes.fromhex("".join(wire for _, wire in GOLDEN))
    assert len(check_round_trip(path, data)) == len(GOLDEN)


@given(some.messages)
def test_any_message_comes_back(event):
    assert list(path().feed(event.encode())) == [event]


def test_path_may_end_between_messages():
    for data in (b"", Shut(0).encode()):
        outcome = read(path(), [data])
        assert (outcome.error, outcome.finished) == (None, True)


BAD = [
    # What is wrong, the bytes up to the one that shows it, the error, its text.
    ("message 0", "0000", StreamError, "a return-path message from 1 to 7, found 0"),
    ("message 8", "0008", StreamError, "found 8"),
    ("message 65535", "ffff", StreamError, "found 65535"),
    ("shut of 0 bytes", "0001 0000", StreamError, "expected 4 bytes for message 1, found 0"),
    ("pong of 5 bytes", "0002 0005", StreamError, "expected 4 bytes for message 2, found 5"),
    ("a request of 13 bytes", "0003 000d", StreamError, "14 to 268 bytes for message 3, found 13"),
    (
        "a request of 269 bytes",
        "0003 010d",
        StreamError,
        "14 to 268 bytes for message 3, found 269",
    ),
    ("a request of 64 KiB", "0003 ffff", StreamError, "found 65535"),
    (
        "a short name",
        "0003 000e " + "00" * 8 + "00001000 02 72",
        StreamError,
        "1 as the length of",
    ),
    (
        "a long name",
        "0003 000f " + "00" * 8 + "00001000 01 7272",
        StreamError,
        "2 as the length of",
    ),
    ("a name with NUL", "0003 000e " + "00" * 8 + "00001000 01 00", StreamError, "printable text"),
    ("a request of no bytes", "0004 000c " + "00" * 12, StreamError, "one or more .* 0x0.0x0"),
    ("one beyond 2^64", "0004 000c" + "ff" * 8 + "00000002", StreamError, "below 2.64, found"),
    ("have-pages of no block", "0005 0001", StreamError, "2 to 256 bytes for message 5, found 1"),
    ("have-pages, short name", "0005 0002 02 72", StreamError, "1 as the length .* found 2"),
    ("a resume ack of 0", "0006 0004 00000000", StreamError, "an acknowledgement of 1, found 0"),
    ("a switchover ack of 1 byte", "0007 0001", StreamError, "0 bytes for message 7, found 1"),
]


@pytest.mark.parametrize(("wrong", "wire", "kind", "message"), BAD, ids=[b[0] for b in BAD])
def test_message_is_refused_with(wrong, wire, kind, message):
    data = Pong(1).encode() + bytes.fromhex(wire)
    outcome = read(path(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert (outcome.place.offset, outcome.place.channel) == (8, "return path")
    assert read_in_every_way(path, data).error is not None


BAD_BITMAPS = [
    # What is wrong, what follows the message of 7 bytes, the error, its text, the offset.
    ("a bitmap that is too large", "0000000000000808", LimitExceeded, "most 2048 .*found 2056", 7),
    ("a bitmap of 2^64 - 1", "ff" * 8, LimitExceeded, "found 18446744073709551615", 7),
    ("half a word", "0000000000000004", StreamError, "a multiple of 8 bytes, found 4", 7),
    (
        "no end mark",
        "0000000000000000" + "0123456789abcdee",
        StreamError,
        "the end mark 0x123456789abcdef, found 0x123456789abcdee",
        15,
    ),
]


@pytest.mark.parametrize(
    ("wrong", "wire", "kind", "message", "offset"), BAD_BITMAPS, ids=[b[0] for b in BAD_BITMAPS]
)
def test_bitmap_is_refused_with(wrong, wire, kind, message, offset):
    data = bytes.fromhex("0005 0003 02 7272" + wire)
    outcome = read(path(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert outcome.place.offset == offset


def test_no_bitmap_is_accepted_unless_its_size_is_allowed():
    data = HavePages("r", bytes(8)).encode()
    assert isinstance(read(ReturnPathReader(), [data]).error, LimitExceeded)
    assert read(ReturnPathReader(max_bitmap=8), [data]).error is None


def test_bitmap_of_many_reads_comes_back():
    message = HavePages("pc.ram", bytes(range(256)) * 64)
    reader = ReturnPathReader(max_bitmap=1 << 20)
    outcome = read(reader, [bytes([byte]) for byte in message.encode()])
    assert outcome.written == message.encode()
