"""What follows the package of a postcopy migration: read as it is, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.wire.feeding import check_invariant, check_round_trip, check_truncation, read
from tests.wire.test_mutations import changed
from vmferry.pages import PAGE, XBZRLE, ZERO
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import Ping, PostcopyResume, RamDiscard, ReceivedBitmap
from vmferry.wire.postcopy import Continuation, PostcopyReader, UrgentReader
from vmferry.wire.ram import RamBlock, RamEnd
from vmferry.wire.sections import EndOfStream, SectionEnd, SectionFooter, SectionPart

SIZE = 1024
BLOCKS = (RamBlock("ram", 8 * SIZE), RamBlock("rom", 2 * SIZE))
NUMBER = 2
FOOTER = SectionFooter(NUMBER).encode()


def start(*, footers: bool = True, current: str | None = None) -> Continuation:
    return Continuation(BLOCKS, SIZE, NUMBER, footers, current)


def record(block: str, page: int, kind: int = PAGE) -> bytes:
    head = (page * SIZE | kind).to_bytes(8) + encode_name(block)
    return head + (bytes([page + 1]) * SIZE if kind == PAGE else b"\0")


def part(*records: bytes, last: bool = False, footer: bytes = FOOTER) -> bytes:
    head = SectionEnd(NUMBER, "ram") if last else SectionPart(NUMBER, "ram")
    return head.encode() + b"".join(records) + RamEnd().encode() + footer


PAGES = (record("ram", 3), record("rom", 1, ZERO), record("ram", 0))
REST = part(*PAGES) + Ping(4).encode() + part() + part(record("ram", 5), last=True) + b"\0"
RECOVERY = (
    b"".join(ReceivedBitmap(block.name).encode() for block in BLOCKS)
    + PostcopyResume().encode()
    + part(*PAGES)
    + EndOfStream().encode()
)
URGENT = b"".join(PAGES) + RamEnd().encode()


def test_rest_is_read() -> None:
    check_round_trip(lambda: PostcopyReader(start()), REST)
    check_truncation(lambda: PostcopyReader(start()), REST)


def test_without_footers() -> None:
    check_round_trip(lambda: PostcopyReader(start(footers=False)), part(*PAGES, footer=b"") + b"\0")


def test_recovery_is_read() -> None:
    check_round_trip(lambda: PostcopyReader(start(), recovery=True), RECOVERY)
    check_truncation(lambda: PostcopyReader(start(), recovery=True), RECOVERY)


def test_urgent_pages_are_read_up_to_their_end() -> None:
    check_round_trip(lambda: UrgentReader(start()), URGENT)
    assert read(UrgentReader(start()), []).finished


def test_page_goes_on_in_the_block_of_the_one_before_the_package() -> None:
    page = (SIZE | PAGE | 0x20).to_bytes(8) + bytes(SIZE)
    check_round_trip(lambda: PostcopyReader(start(current="rom")), part(page) + b"\0")
    # On a new connection nothing is known of it.
    outcome = read(
        PostcopyReader(start(current="rom"), recovery=True), [PostcopyResume().encode(), part(page)]
    )
    assert "names its RAM block" in str(outcome.error)


@pytest.mark.parametrize(
    "bad",
    [
        PostcopyResume().encode(),
        ReceivedBitmap("ram").encode(),
        RamDiscard("ram", ((0, SIZE),)).encode(),
        SectionPart(7, "ram").encode(),
        part(last=True) + part(),
        part(record("ram", 8)),
        part(record("other", 0)),
        part((XBZRLE).to_bytes(8) + encode_name("ram") + b"\1\0\0"),
        part(footer=SectionFooter(3).encode()),
        b"\1",
        b"\4",
    ],
)
def test_what_does_not_belong_there_is_refused(bad: bytes) -> None:
    outcome = read(PostcopyReader(start()), [bad], end=False)
    assert outcome.error is not None
    assert outcome.place.channel == "main"


@pytest.mark.parametrize("early", [part(*PAGES), part(last=True), EndOfStream().encode()])
def test_nothing_comes_before_a_recovery_goes_on(early: bytes) -> None:
    """An end at which nobody has said what is missing would leave zeros there."""
    outcome = read(PostcopyReader(start(), recovery=True), [early])
    assert "before memory or the end" in str(outcome.error)


def test_resumed_once_only() -> None:
    again = PostcopyResume().encode() * 2
    assert read(PostcopyReader(start(), recovery=True), [again]).error is not None


@settings(max_examples=300)
@given(
    st.sampled_from([REST, RECOVERY]).flatmap(
        lambda data: changed(data, [at for at in range(len(data)) if data[at] in {0, 2, 3, 8}])
    ),
    st.integers(0, 99),
    st.booleans(),
)
def test_changed_rest_is_read_or_refused(data: bytes, cut: int, recovery: bool) -> None:
    check_invariant(lambda: PostcopyReader(start(), recovery=recovery), data, cut)
