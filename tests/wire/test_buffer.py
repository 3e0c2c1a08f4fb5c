from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.wire.feeding import Steps, check_truncation, read, read_in_every_way
from vmferry.errors import TruncatedStream, UsageError
from vmferry.wire.buffer import Cursor, Parse, ReceiveBuffer, decode_name, encode_name


def fill(buffer, data):
    while data:
        room = buffer.room()
        piece = data[: len(room)]
        room[: len(piece)] = piece
        buffer.received(len(piece))
        data = data[len(piece) :]


operations = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3000)), max_size=30)


@given(operations, st.sampled_from((64, 1000, 4096)))
def test_buffer_holds_what_came_in_and_was_not_passed(steps, capacity):
    buffer, waiting, passed = ReceiveBuffer(capacity), b"", 0
    for came, asked in steps:
        data = bytes((passed + at) % 251 for at in range(came))
        fill(buffer, data)
        waiting += data
        assert buffer.view() == waiting
        go = min(asked, len(waiting))
        assert buffer.peek(go) == waiting[:go]
        buffer.advance(go)
        waiting, passed = waiting[go:], passed + go
        assert (len(buffer), buffer.offset) == (len(waiting), passed)


@given(st.lists(st.integers(1, 500), max_size=60), st.sampled_from((64, 256)))
def test_room_is_never_empty_and_a_quarter_of_the_buffer_at_least(reads, capacity):
    buffer = ReceiveBuffer(capacity)
    for count in reads:
        room = buffer.room()
        assert len(room) >= capacity // 4
        buffer.received(min(count, len(room)))
        if count % 3 == 0:
            buffer.advance(len(buffer) // 2)


def test_buffer_grows_with_what_came_in_alone():
    buffer = ReceiveBuffer(1024)
    for came in range(64, 1 << 18, 64):
        room = buffer.room()
        buffer.received(64)
        assert len(room) + len(buffer) - 64 <= max(1024, 4 * came)


def test_views_stay_right_until_room_is_asked_for():
    buffer = ReceiveBuffer(64)
    fill(buffer, bytes(range(60)))
    view = buffer.peek(60)
    buffer.advance(60)
    assert bytes(view) == bytes(range(60))


def test_grown_buffer_leaves_older_views_as_they_were():
    buffer = ReceiveBuffer(64)
    fill(buffer, bytes(range(60)))
    view = buffer.view()
    fill(buffer, bytes(1000))
    assert bytes(view) == bytes(range(60))
    assert bytes(buffer.peek(61)) == bytes(range(60)) + b"\0"


def test_nothing_received_is_the_end():
    buffer = ReceiveBuffer(64)
    assert not buffer.ended
    buffer.received(0)
    assert buffer.ended


def number(at: Cursor) -> Parse[int]:
    return (yield from at.number(4, "a number"))


def name(at: Cursor) -> Parse[str]:
    return (yield from at.name("the name of a thing"))


def taken(at: Cursor) -> Parse[bytes]:
    return (yield from at.take(3, "three bytes"))


def peeked(at: Cursor) -> Parse[int]:
    value = yield from at.peek_number(2, "two bytes")
    at.buffer.advance(2)
    return value


def test_cursor_reads_numbers_names_and_bytes():
    data = b"\0\0\1\0" + b"\5pc.ro" + b"abc" + b"\x12\x34"
    steps = (number, name, taken, peeked)
    assert read_in_every_way(lambda: Steps(*steps), data).events == [256, "pc.ro", b"abc", 0x1234]
    check_truncation(lambda: Steps(*steps), data)


def test_truncation_tells_what_is_missing_and_where():
    outcome = read(Steps(number, number), [b"\0\0\0\1\0"])
    assert isinstance(outcome.error, TruncatedStream)
    assert str(outcome.error) == (
        'expected a number, found the end of the input after 1 of 4 bytes (channel "test",'
        " byte 0x4); the stream was cut off, or its sender failed"
    )


def test_broken_reader_raises_the_same_again():
    reader = Steps(name)
    first = read(reader, [b"\0"]).error
    assert first is not None
    assert read(reader, [b"more"]).error is first
    assert not reader.finished


def test_reader_that_failed_in_another_way_is_not_finished():
    def out_of_memory(at: Cursor) -> Parse[None]:
        yield from at.take(1, "a byte")
        raise MemoryError

    reader = Steps(out_of_memory)
    with pytest.raises(MemoryError):
        list(reader.feed(b"x"))
    assert list(reader.feed(b"y")) == []
    assert not reader.finished


def test_reader_takes_nothing_behind_its_end():
    reader = Steps(number)
    assert read(reader, [b"\0\0\0\7junk", b"more"]).events == [7]
    assert reader.finished
    assert reader.buffer.offset == 4


@pytest.mark.parametrize("text", ["a", "n" * 255, "pc.ram", "/rom@etc/acpi/tables", "ü" * 127])
def test_name_comes_back(text):
    raw = encode_name(text)
    assert raw[0] == len(raw) - 1
    assert decode_name(raw[1:], "a name", 0) == text
    assert read_in_every_way(lambda: Steps(name), raw).events == [text]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b"", "an empty name"),
        (b"a\0b", r'"a\x00b"'),
        (b"\xff\xfe", r'"\\xff\\xfe"'),
        (b"a\nb", r'"a\nb"'),
        (b"\x1b[31m", r'"\x1b[31m"'),
        ("\u202e".encode(), r'"\u202e"'),
        (b"\xed\xa0\x80", r'"\\xed\\xa0\\x80"'),
        (b"a" * 200 + b"\0", '"' + "a" * 200 + '\\x00"'),
    ],
)
def test_name_that_is_no_printable_text_is_refused(raw, found):
    outcome = read_in_every_way(lambda: Steps(name), bytes([len(raw)]) + raw)
    assert outcome.error is not None
    assert outcome.error.found == found
    assert outcome.error.expected == "the name of a thing as printable text of 1 to 255 bytes"
    assert outcome.place.offset == 0


@pytest.mark.parametrize("text", ["", "n" * 256, "ü" * 128])
def test_name_that_no_length_byte_can_tell_is_not_written(text):
    with pytest.raises(UsageError, match=r"a name has 1 to 255 bytes, and .* has"):
        encode_name(text)
