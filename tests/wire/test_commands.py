from __future__ import annotations

import pytest
from hypothesis import given

from tests.wire import strategies as some
from tests.wire.feeding import Steps, check_round_trip, check_truncation, read
from vmferry.errors import LimitExceeded, StreamError
from vmferry.wire.commands import (
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
    SwitchoverStart,
    parse_command,
)

LISTEN, RUN = PostcopyListen().encode(), PostcopyRun().encode()


def steps() -> Steps:
    return Steps(parse_command)


GOLDEN = [
    (OpenReturnPath(), "08 0001 0000"),
    (Ping(1), "08 0002 0004 00000001"),
    (PostcopyAdvise(0x1000, 0x1000), "08 0003 0010 0000000000001000 0000000000001000"),
    (PostcopyAdvise(0x201000, 0x1000), "08 0003 0010 0000000000201000 0000000000001000"),
    (PostcopyAdvise(), "08 0003 0000"),
    (PostcopyListen(), "08 0004 0000"),
    (PostcopyRun(), "08 0005 0000"),
    (
        RamDiscard("pc.ram", ((0x1000, 0x3F04000),)),
        "08 0006 0019 00 06 70632e72616d 00 0000000000001000 0000000003f04000",
    ),
    (
        RamDiscard("r", ((0, 1), ((1 << 64) - 1, 1))),
        "08 0006 0024 00 01 72 00" + "00" * 8 + "00" * 7 + "01" + "ff" * 8 + "00" * 7 + "01",
    ),
    (
        Package(bytes.fromhex("0800040000 0400 0800050000"), 9),
        "08 0007 0004 0000000c 08 0004 0000 0400 08 0005 0000",
    ),
    (EnableColo(), "08 0008 0000"),
    (PostcopyResume(), "08 0009 0000"),
    (ReceivedBitmap("pc.ram"), "08 000a 0007 06 70632e72616d"),
    (ReceivedBitmap("n" * 255), "08 000a 0100 ff" + "6e" * 255),
    (SwitchoverStart(), "08 000b 0000"),
]


@pytest.mark.parametrize(("event", "wire"), GOLDEN, ids=[type(g[0]).__name__ for g in GOLDEN])
def test_command_is_read_and_written_as_captured(event, wire):
    data = bytes.fromhex(wire)
    assert event.encode() == data
    assert list(steps().feed(data)) == [event]
    check_round_trip(steps, data)
    check_truncation(steps, data)


@given(some.commands)
def test_any_command_comes_back(event):
    assert list(steps().feed(event.encode())) == [event]


def test_package_of_several_reads_is_lent_whole():
    content = LISTEN + b"\4" + bytes(range(256)) * 1000 + RUN
    package = Package(content, 9)
    assert check_round_trip(steps, package.encode())[0][1]["content"] == content


PACKAGED = "08 0007 0004 "
BAD_PACKAGES = [
    # What is wrong, the content, the text of the error, its offset in the content.
    ("no LISTEN", b"\4" * 5 + RUN, "that begins with LISTEN .*, found 04 04 04 04 04", 0),
    ("RUN alone", RUN, "begins with LISTEN .08 00 04 00 00., found 08 00 05 00 00", 0),
    ("half of LISTEN", LISTEN[:3], "begins with LISTEN .*, found 08 00 04", 0),
    ("LISTEN alone", LISTEN, "a device, a ping or RUN behind LISTEN", 5),
    ("a package", LISTEN + bytes.fromhex("0800070004"), "behind LISTEN, found 08 00 07", 5),
    ("a part", LISTEN + b"\2" * 5 + RUN, "behind LISTEN, found 02 02 02", 5),
    ("LISTEN again", LISTEN * 2 + RUN, "behind LISTEN, found 08 00 04", 5),
    ("no RUN", LISTEN + b"\4" * 9, "that ends with RUN .*, found 04 04 04 04 04", 9),
    ("something behind RUN", LISTEN + RUN + b"\0", "ends with RUN .*, found 00 05 00 00 00", 6),
    ("a ping last", LISTEN + Ping(3).encode(), "ends with RUN .*, found 04 00 00 00 03", 9),
]


@pytest.mark.parametrize(
    ("wrong", "content", "message", "offset"), BAD_PACKAGES, ids=[b[0] for b in BAD_PACKAGES]
)
def test_package_is_refused_with(wrong, content, message, offset):
    data = bytes.fromhex(PACKAGED) + len(content).to_bytes(4) + content
    outcome = read(steps(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert outcome.place.offset == 9 + offset


DISCARD = "08 0006 "
RANGE = "00" * 15 + "01"
BAD = [
    # What is wrong, the bytes up to the one that shows it, the error, its text.
    ("command 0", "08 0000", StreamError, "expected a command from 1 to 11, found 0"),
    ("command 12", "08 000c", StreamError, "expected a command from 1 to 11, found 12"),
    ("command 65535", "08 ffff", StreamError, "found 65535"),
    ("a ping of 2 bytes", "08 0002 0002", StreamError, "4 bytes for command 2 .Ping., found 2"),
    ("a ping of 5 bytes", "08 0002 0005", StreamError, "4 bytes for command 2 .Ping., found 5"),
    (
        "payload where is none",
        "08 0001 0001",
        StreamError,
        "0 bytes for .*OpenReturnPath., found 1",
    ),
    ("advice of 8 bytes", "08 0003 0008", StreamError, "0 or 16 bytes for command 3 .*, found 8"),
    (
        "a package's length of 8",
        "08 0007 0008",
        StreamError,
        "4 bytes for command 7 .*, found 8",
    ),
    ("an empty package", "08 0007 0004 00000000", LimitExceeded, "a package of 1 to .* found 0"),
    ("a package of 256 MiB + 1", "08 0007 0004 10000001", LimitExceeded, "1 to 268435456 bytes"),
    ("a package of 4 GiB", "08 0007 0004 ffffffff", LimitExceeded, "found 4294967295"),
    ("a discard of 19 bytes", DISCARD + "0013", StreamError, "20 to 65535 bytes for command 6"),
    (
        "another version of discard",
        DISCARD + "0014 01 01 72 00" + RANGE,
        StreamError,
        "version 0 of the discard command, found 1",
    ),
    (
        "a discard without a range",
        DISCARD + "0014 00 11" + "72" * 17 + "00",
        StreamError,
        "one or more ranges of 16 bytes, found 20 bytes of which 17 for the name",
    ),
    (
        "a discard of half a range",
        DISCARD + "001c 00 01 72 00" + RANGE + "00" * 8,
        StreamError,
        "found 28 bytes of which 1 for the name",
    ),
    (
        "a discard whose name is longer than it",
        DISCARD + "0014 00 ff" + "72" * 18,
        StreamError,
        "found 20 bytes of which 255 for the name",
    ),
    (
        "a discard without the zero byte",
        DISCARD + "0014 00 01 72 01" + RANGE,
        StreamError,
        "a zero byte",
    ),
    (
        "a discard of no block",
        DISCARD + "0023 00 00 00" + RANGE * 2,
        StreamError,
        "the name of a RAM block as printable text .* found an empty name",
    ),
    (
        "a discard of nothing",
        DISCARD + "0014 00 01 72 00" + "00" * 16,
        StreamError,
        "a range of one or more bytes below 2.64, found 0x0.0x0",
    ),
    (
        "a discard beyond 2^64",
        DISCARD + "0014 00 01 72 00" + "ff" * 8 + "00" * 7 + "02",
        StreamError,
        "found 0xffffffffffffffff.0x2",
    ),
    (
        "a bitmap of no block",
        "08 000a 0001",
        StreamError,
        "256 bytes for command 10 .*, found 1",
    ),
    ("a bitmap of too much", "08 000a 0101", StreamError, "2 to 256 bytes .* found 257"),
    (
        "a name that is too long",
        "08 000a 0002 02 72",
        StreamError,
        "1 as the length .*, found 2",
    ),
    (
        "a name that is too short",
        "08 000a 0003 01 72 72",
        StreamError,
        "2 as the length .*, found 1",
    ),
    ("a name with NUL", "08 000a 0002 01 00", StreamError, r'found "\\x00"'),
]


@pytest.mark.parametrize(("wrong", "wire", "kind", "message"), BAD, ids=[b[0] for b in BAD])
def test_command_is_refused_with(wrong, wire, kind, message):
    outcome = read(Steps(lead, parse_command), [b"lead", bytes.fromhex(wire)], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError
    assert type(outcome.error) is kind
    assert outcome.place.offset == 4


def lead(at):
    """Four bytes in front, so that an offset of 0 does not pass for the right one."""
    yield from at.take(4, "lead")
    yield from at.need(1, "a command")
