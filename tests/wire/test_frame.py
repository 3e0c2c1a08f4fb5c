from __future__ import annotations

import pytest

from tests.wire.feeding import Steps, check_round_trip, check_truncation, read
from vmferry.errors import StreamError
from vmferry.wire.buffer import Cursor, Parse
from vmferry.wire.layout import Kind
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
    parse_header,
    parse_start,
)


def start(at: Cursor) -> Parse[SectionStart]:
    at.buffer.advance((yield from at.number(1, "a section")) * 0)
    return (yield from parse_start(at))


# The event, its bytes.
GOLDEN = [
    (Header(), "51 45 56 4d 00 00 00 03"),
    (SectionStart(2, "ram", 0, 4), "01 00000002 03 72616d 00000000 00000004"),
    (
        SectionStart(0xFFFFFFFF, "n" * 255, 0xFFFFFFFE, 20061113),
        "01 ffffffff ff" + "6e" * 255 + "fffffffe 01321bb9",
    ),
    (SectionPart(2, "ram"), "02 00000002"),
    (SectionEnd(2, "ram"), "03 00000002"),
    (SectionFooter(0x29), "7e 00000029"),
    (EndOfStream(), "00"),
]


@pytest.mark.parametrize(("event", "wire"), GOLDEN, ids=[type(g[0]).__name__ for g in GOLDEN])
def test_event_is_written_as_captured(event, wire):
    assert event.encode() == bytes.fromhex(wire)


def test_head_of_a_device_differs_in_its_type_byte_alone():
    head = SectionStart(0x1E, "i2c_bus", 0, 1)
    assert head.encode(Kind.FULL) == bytes.fromhex(
        "04 0000001e 07 6932635f627573 00000000 00000001"
    )


@pytest.mark.parametrize("event", [g[0] for g in GOLDEN if isinstance(g[0], SectionStart)])
def test_head_of_a_section_comes_back(event):
    assert check_round_trip(lambda: Steps(start), event.encode())
    assert list(Steps(start).feed(event.encode())) == [event]
    check_truncation(lambda: Steps(start), event.encode())


def test_header_comes_back():
    assert check_round_trip(lambda: Steps(parse_header), Header().encode())
    assert list(Steps(parse_header).feed(Header().encode())) == [Header()]
    check_truncation(lambda: Steps(parse_header), Header().encode())


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("51 45 56 4e", "expected the magic b'QEVM' of a migration stream, found b'QEVN'"),
        ("7f 45 4c 46", r"found b'\\x7fELF' .*; this is not what QEMU's migrate writes"),
        ("11 22 33 44", "found b'\\\\x11\"3D'"),
        ("51 45 56 4d 00 00 00 02", "version 3 of the stream, found version 2 .*; version 2 was"),
        ("51 45 56 4d 00 00 00 04", "expected version 3 of the stream, found version 4"),
        ("51 45 56 4d 03 00 00 00", "expected version 3 of the stream, found version 50331648"),
    ],
)
def test_other_header_is_refused(wire, message):
    outcome = read(Steps(parse_header), [bytes.fromhex(wire)], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError
    assert outcome.place.offset == 0
