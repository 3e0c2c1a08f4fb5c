"""Iterable sections of machines in Python: frames, however they are cut, and bad ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.wire.feeding import check_round_trip, read
from tests.wire.streams import CONFIGURATION, HEADER, join
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream
from vmferry.wire.framed import Frame
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.sections import (
    EndOfStream,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

START = SectionStart(1, "disk", 5, 9)
OPEN = join(HEADER, CONFIGURATION, START)
SMALL = Frame(4, b"ab")


def reader(**options: Any) -> StreamReader:
    return StreamReader(tolerate=Tolerate.NO_RAM, framed=True, **options)


def test_frames_are_read_however_they_are_cut() -> None:
    data = join(
        *(OPEN, SMALL, SectionFooter(1)),
        *(SectionPart(1, "disk"), Frame(4, b""), SectionFooter(1)),
        *(SectionPart(1, "disk"), Frame(4, b"abcd"), SectionFooter(1)),
        *(SectionStart(2, "disk", 6, 0), Frame(1, b"x"), SectionFooter(2)),
        *(SectionEnd(1, "disk"), Frame(4, b"\0"), SectionFooter(1)),
        *(SectionEnd(2, "disk"), Frame(1, b""), SectionFooter(2), EndOfStream()),
    )
    check_round_trip(reader, data)


def test_frame_is_padded_with_zeros() -> None:
    assert SMALL.encode() == bytes.fromhex("56465259 00000004 00000002 6162 0000")


def test_reader_that_does_not_ask_for_frames_refuses_them() -> None:
    error = read(StreamReader(tolerate=Tolerate.NO_RAM), [join(OPEN, SMALL)], end=False).error
    assert 'found "disk"' in str(error)
    assert "have no length" in str(error)


BAD = [
    # What is wrong, what stands behind the start, the kind of error, its text.
    ("no frame", b"VFRX", StreamError, 'can be read .*found "disk"'),
    ("an end before the magic", b"VF", StreamError, 'can be read .*found "disk"'),
    ("an end in the head", b"VFRY\0", TruncatedStream, "the head of a frame, .* 5 of 12"),
    ("an end in the data", SMALL.encode()[:-1], TruncatedStream, "15 of 16 bytes"),
    ("a frame for nothing", Frame(0, b"").encode(), LimitExceeded, "found 0 .*byte 0x"),
    ("a large frame", b"VFRY" + bytes.fromhex("00100001 00000000"), LimitExceeded, "1048577"),
    (
        "more used than there is",
        b"VFRY" + bytes.fromhex("00000001 00000002 00"),
        StreamError,
        "t 1",
    ),
    ("dirt behind", SMALL.encode()[:-1] + b"x", StreamError, "zeros behind the 2 bytes"),
    (
        "another size",
        join(SMALL, SectionFooter(1), SectionPart(1, "disk"), Frame(5, b"")),
        StreamError,
        r'4 bytes, as all of this section, found 5 .*section "disk"',
    ),
    (
        "a later body without a frame",
        join(SMALL, SectionFooter(1), SectionPart(1, "disk"), bytes(12)),
        StreamError,
        "a frame .56 46 52 59., found",
    ),
    (
        "the same again",
        join(SMALL, SectionFooter(1), SectionStart(2, "disk", 5, 9), SMALL),
        StreamError,
        "one section disk, found a second one",
    ),
]


@pytest.mark.parametrize(("data", "kind", "text"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_frame_is_refused(data: bytes, kind: type[StreamError], text: str) -> None:
    whole = OPEN + data
    for pieces in ([whole], [whole[i : i + 1] for i in range(len(whole))]):
        error = read(reader(), pieces).error
        assert type(error) is kind
        assert re.search(text, str(error)), str(error)


def test_sections_are_bounded() -> None:
    many = [
        join(SectionStart(n, "disk", n, 0), Frame(1, b""), SectionFooter(n)) for n in range(1025)
    ]
    error = read(reader(), [join(HEADER, CONFIGURATION, *many)], end=False).error
    assert "at most 1024 iterable sections" in str(error)
