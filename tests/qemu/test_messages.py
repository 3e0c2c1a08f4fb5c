"""Messages in a stream of bytes, however they are cut and whatever else is in it."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import PeerError
from vmferry.qemu.messages import Splitter, read_message, write_message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
OBJECTS = st.dictionaries(st.text(), JSON)
BETWEEN = st.sampled_from([b"", b" ", b"\n", b"\r\n", b"\r\n\r\n"])


def split(data: bytes, pieces: list[int], limit: int = 1 << 20) -> list[bytes]:
    splitter = Splitter(limit)
    found: list[bytes] = []
    for length in pieces:
        found += splitter.feed(data[:length])
        data = data[length:]
    return [*found, *splitter.feed(data)]


@given(
    st.lists(st.tuples(OBJECTS, st.sampled_from([None, 1]), BETWEEN)),
    st.lists(st.integers(min_value=1, max_value=20)),
)
def test_messages_are_found_however_they_are_cut(
    messages: list[tuple[dict[str, Any], int | None, bytes]], pieces: list[int]
) -> None:
    data = b"".join(
        json.dumps(message, indent=indent, ensure_ascii=False).encode() + between
        for message, indent, between in messages
    )
    expected = [message for message, _, _ in messages]
    assert [read_message(text) for text in split(data, pieces)] == expected


@given(OBJECTS)
def test_message_is_one_line(message: dict[str, Any]) -> None:
    data = write_message(message)
    assert data.endswith(b"\r\n")
    assert data.count(b"\n") == 1
    assert [read_message(text) for text in split(data, [])] == [message]


@given(st.binary(), st.lists(st.integers(min_value=1, max_value=20)))
def test_any_bytes_are_an_error_at_worst(data: bytes, pieces: list[int]) -> None:
    found = split(data, pieces)
    assert found == split(data, [])
    for text in found:
        with contextlib.suppress(PeerError):
            read_message(text)


@pytest.mark.parametrize(
    "nonsense",
    [b"foo\n", b"HTTP/1.1 400 Bad Request\r\n", b'"\n', b"}", b"]", b'{"a\n', b'{"a": 1]', b"3\n"],
)
def test_what_follows_nonsense_is_read(nonsense: bytes) -> None:
    first, second = split(nonsense + b'{"execute": "x"}', [])
    with pytest.raises(PeerError, match="expected a QMP message"):
        read_message(first)
    assert read_message(second) == {"execute": "x"}


@pytest.mark.parametrize(
    "text",
    [b"[1]", b'"x"', b"null", b'{"a": NaN}', b'{"a": 1e}', b"\xff{}", b'{"a":' * 5000, b"{'a': 1}"],
)
def test_what_is_no_message_is_refused(text: bytes) -> None:
    with pytest.raises(PeerError, match="expected a QMP message"):
        read_message(text)


@pytest.mark.parametrize("data", [b"{" * 200, b'{"a": "' + b"x" * 200 + b'"}', b" " * 200])
def test_length_is_bounded(data: bytes) -> None:
    with pytest.raises(PeerError, match="at most 100 bytes"):
        split(data, [], limit=100)


def test_limit_is_for_each_message() -> None:
    assert len(split(b'{"a": "' + b"x" * 80 + b'"}' + b"{}" * 100, [], limit=100)) == 101
