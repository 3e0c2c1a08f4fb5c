"""NBD servers that break the rules: each gets an error, and no further."""

from __future__ import annotations

import errno
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images.scripted import (
    CONTEXT,
    DONE,
    FLAGS,
    GREETING,
    OPENED,
    OPENED_SIMPLE,
    SIZE,
    STRUCTURED,
    blocks,
    chunk,
    data,
    export,
    failure,
    hole,
    option_reply,
    saying,
    simple,
    status,
)
from tests.images.support import read
from vmferry.errors import StorageError, UsageError
from vmferry.images import Extent, Image, open_image
from vmferry.images.nbd.uri import NbdAddress, parse


def _name(value: bytes | str) -> str:
    return value if isinstance(value, str) else ""


BEGUN = GREETING + STRUCTURED + CONTEXT


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (b"", "closed the connection"),
        (GREETING[:10], "closed the connection"),
        (b"x" * 18, "expected the greeting of NBD"),
        (b"NBDMAGIC" + bytes(10), "fixed newstyle"),
        (GREETING[:-1] + b"\x02", "fixed newstyle"),
        (GREETING + option_reply(9, 1), "a reply to STRUCTURED_REPLY"),
        (GREETING + bytes(20), "a reply to STRUCTURED_REPLY"),
        (GREETING + option_reply(8, 2), "an answer to STRUCTURED_REPLY"),
        (GREETING + option_reply(8, 1, bytes(20000)), "at most 16384 bytes, found one of 20000"),
        (
            GREETING + STRUCTURED + option_reply(10, 4, bytes(4) + b"other"),
            "one of the contexts that were asked for",
        ),
        (BEGUN + DONE, "the size of the export"),
        (BEGUN + export() * 100, "at most 64 replies"),
        (BEGUN + export(size=1 << 63), "a size below 8 EiB"),
        (BEGUN + export(flags=0), "flags"),
        (BEGUN + option_reply(7, 3, bytes(4)), "12 bytes on the export"),
        (BEGUN + option_reply(7, 3, b"\0\3"), "14 bytes on block sizes"),
        (BEGUN + option_reply(7, 3), "information on the export"),
        (BEGUN + export() + blocks(0) + DONE, "minimum block size"),
        (BEGUN + export() + blocks(3) + DONE, "minimum block size"),
        (BEGUN + export() + blocks(1 << 17) + DONE, "minimum block size"),
        (BEGUN + export() + blocks(4096, 512) + DONE, "minimum block size"),
        (BEGUN + export(size=5000) + blocks(4096) + DONE, "a size in blocks of 4096"),
        (BEGUN + option_reply(7, 0x80000006, b"no\x1b[m"), r'no such export: "no\\x1b\[m"'),
        (BEGUN + option_reply(7, 0x80000005), "asks for TLS"),
        (BEGUN + option_reply(7, 0x80001234), "answers with error 0x80001234"),
        (BEGUN + export(flags=FLAGS & ~4) + DONE, "has no flush"),
        (BEGUN + export(flags=FLAGS | 2) + DONE, "a read-only one"),
    ],
    ids=_name,
)
def test_opening(tmp_path: Path, script: bytes, message: str) -> None:
    with saying(script, tmp_path) as uri, pytest.raises(StorageError, match=message) as caught:
        open_image(uri, active=True)
    assert uri in str(caught.value)


READS = [
    (simple(), "a structured reply"),
    (b"\0\0\0\0" * 8, "a reply, found the number"),
    (data(0, bytes(512), cookie=9), "the reply to request 1, found one to 9"),
    (data(0, bytes(511)), "found 511"),
    (data(0, bytes(513)), "bytes of the 512 from 0 on"),
    (data(512, bytes(512)), "bytes of the 512 from 0 on"),
    (data((1 << 64) - 512, bytes(512)), "bytes of the 512 from 0 on"),
    (data(0, b""), "a chunk that fits"),
    (data(0, bytes(400), flags=0) + data(300, bytes(212)), "every byte once"),
    (data(0, bytes(100), flags=0) + data(200, bytes(312)), "every byte once"),
    (chunk(0), "512 bytes, found 0"),
    (chunk(0, flags=0), "a chunk that fits"),
    (chunk(0, b"x"), "a chunk that fits"),
    (chunk(99), "a chunk that fits"),
    (hole(0, 513), "bytes of the 512 from 0 on"),
    (hole(0, 0), "bytes of the 512 from 0 on"),
    (chunk(2, bytes(11)), "a chunk that fits"),
    (status((512, 0)), "a block status that was asked for"),
    (failure(0), "an error and its text"),
    (chunk(32769, struct.pack(">IH", 5, 100) + b"short"), "an error and its text"),
    (chunk(32769, bytes(5)), "an error of at most 4096"),
    (chunk(32769, bytes(9999)), "an error of at most 4096"),
    (data(0, bytes(512))[:-1], "closed the connection"),
    (data(0, b"x", flags=0) + simple(), "a structured reply"),
    (b"".join(data(at, b"x", flags=0) for at in range(512)) * 2, "closed the connection"),
]


@pytest.mark.parametrize(("script", "message"), READS, ids=_name)
def test_reading(tmp_path: Path, script: bytes, message: str) -> None:
    with saying(OPENED + script, tmp_path) as uri:
        image = open_image(uri, active=True)
        with pytest.raises(StorageError, match=message):
            read(image, 0, 512)
        with pytest.raises(StorageError, match="the connection is lost"):
            image.write(0, b"x")
        with pytest.raises(StorageError):
            image.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (status(), "a block status that was asked for"),
        (status((512, 0), context=8), "context 7, once each, found 8"),
        (status((0, 0)), "extents within the request"),
        (status((SIZE, 0), (512, 0)), "extents within the request"),
        (status((512, 0), flags=0) + status((512, 0)), "a block status that was asked for"),
        (chunk(0), "the status of blocks, found none"),
        (chunk(5, bytes(7)), "a block status that was asked for"),
        (chunk(5, bytes(4 + 8 * ((1 << 17) + 1))), "at most 131072 extents"),
        (data(0, bytes(512)), "bytes of the"),
    ],
    ids=_name,
)
def test_status(tmp_path: Path, script: bytes, message: str) -> None:
    with saying(OPENED + script, tmp_path) as uri:
        image = open_image(uri, active=True)
        with pytest.raises(StorageError, match=message):
            list(image.allocated())
        with pytest.raises(StorageError):
            image.close()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (data(0, b"a" * 512), b"a" * 512),
        (data(200, b"b" * 312, flags=0) + data(0, b"a" * 200), b"a" * 200 + b"b" * 312),
        (hole(0, 500, flags=0) + data(500, b"c" * 12, flags=0) + chunk(0), bytes(500) + b"c" * 12),
    ],
)
def test_answers_in_any_order_are_good(tmp_path: Path, script: bytes, expected: bytes) -> None:
    with saying(OPENED + script, tmp_path) as uri:
        image = open_image(uri, active=True)
        into = bytearray(b"\xff" * 512)
        image.read(0, into)
        assert into == expected
        with pytest.raises(StorageError):
            image.close()  # its flush is not answered


def test_server_that_has_no_chunk_as_large_as_a_read_sends_several(tmp_path: Path) -> None:
    opened = GREETING + STRUCTURED + CONTEXT + export(flags=FLAGS | 128) + DONE
    pieces = data(0, b"one", flags=0, cookie=2) + data(3, b"two", cookie=2)
    script = opened + failure(75, b"too large") + pieces
    with saying(script + simple(cookie=3), tmp_path) as uri, open_image(uri, active=True) as image:
        assert read(image, 0, 6) == b"onetwo"


def test_server_without_structured_replies(tmp_path: Path) -> None:
    script = OPENED_SIMPLE + simple() + b"s" * 512 + simple(cookie=2) + simple(cookie=3)
    with saying(script, tmp_path) as uri, open_image(uri, active=True) as image:
        assert list(image.allocated()) == [Extent(0, SIZE)]
        assert read(image, 0, 512) == b"s" * 512
        image.write(0, b"x", durable=True)


def test_last_extent_may_go_beyond(tmp_path: Path) -> None:
    script = OPENED + status((4096, 3), (8192, 0), (1 << 31, 2)) + chunk(0, cookie=2)
    with saying(script, tmp_path) as uri, open_image(uri, active=True) as image:
        assert list(image.allocated()) == [Extent(4096, 8192)]


@pytest.mark.parametrize(
    ("number", "text", "expected"),
    [
        (28, b"", "No space left on device; free some space"),
        (5, b"bad\x1b", r'Input/output error \(the server says "bad\\x1b"\)'),
        (4242, b"", "Input/output error"),
    ],
)
def test_errors_of_the_server_leave_the_connection_usable(
    tmp_path: Path, number: int, text: bytes, expected: str
) -> None:
    script = OPENED + failure(number, text) + chunk(0, cookie=2) + chunk(0, cookie=3)
    with saying(script, tmp_path) as uri, open_image(uri, active=True) as image:
        with pytest.raises(StorageError, match=expected) as caught:
            image.write(0, b"x")
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == (errno.ENOSPC if number == 28 else errno.EIO)
        image.write(0, b"y")


SESSION = OPENED + b"".join(
    (
        status((SIZE // 2, 0), (SIZE // 2, 3)),
        data(0, b"a" * 256, flags=0, cookie=2) + hole(256, 256, cookie=2),
        failure(5, b"no", cookie=3),
        chunk(0, cookie=4),
        chunk(0, cookie=5),
    )
)


def session(image: Image) -> None:
    assert list(image.allocated()) == [Extent(0, SIZE // 2)]
    assert read(image, 0, 512) == b"a" * 256 + bytes(256)
    with pytest.raises(StorageError):
        image.discard(0, 512)
    image.write(0, b"x")


def test_the_session_that_is_garbled_below_is_a_good_one(tmp_path: Path) -> None:
    with saying(SESSION, tmp_path) as uri, open_image(uri, active=True) as image:
        session(image)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(SESSION) - 1), st.integers(0, 40), st.binary(max_size=24), st.booleans())
def test_garbled_sessions_end_in_a_storage_error_or_not_at_all(
    tmp_path: Path, at: int, cut: int, put: bytes, whole: bool
) -> None:
    rest = SESSION[at + (len(put) if whole else cut) :]
    with saying(SESSION[:at] + put + rest, tmp_path) as uri:
        try:
            with open_image(uri, active=True) as image:
                for extent in image.allocated():
                    assert extent.length > 0
                    assert extent.end <= image.size
                read(image, 0, 512)
                image.write(0, b"x")
        except StorageError:
            pass


def test_slow_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("vmferry.images.nbd.storage._TIMEOUT", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(StorageError, match="stays silent"):
            open_image(f"nbd+unix:///?socket={tmp_path / 's'}", active=True)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://host/disk", NbdAddress(("host", 10809), "disk")),
        ("nbd://[::1]:10/", NbdAddress(("::1", 10), "")),
        ("nbd://host", NbdAddress(("host", 10809), "")),
        ("nbd+unix:///a%2Fb?socket=/tmp/s", NbdAddress("/tmp/s", "a/b")),
        ("nbd+unix:///?socket=/tmp/with%20space", NbdAddress("/tmp/with space", "")),
    ],
)
def test_uris(uri: str, address: NbdAddress) -> None:
    assert parse(uri) == address


@pytest.mark.parametrize(
    "uri",
    [
        "nbd:",
        "nbd:///disk",
        "nbd://host:port/",
        "nbd://host:99999/",
        "nbd://user@host/",
        "nbd://host/#x",
        "nbd://host/?socket=/s",
        "nbd://[::1/",
        "nbd+unix:///disk",
        "nbd+unix://host/disk?socket=/s",
        "nbd+unix:///disk?socket=/s&tls=1",
        "nbd+unix:///disk?",
        "nbd://host/" + "x" * 5000,
    ],
)
def test_uris_that_are_refused(uri: str) -> None:
    with pytest.raises(UsageError, match="expected nbd://HOST"):
        open_image(uri, active=False)
