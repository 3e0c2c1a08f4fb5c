from __future__ import annotations

import random
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import StreamError
from vmferry.pages.compression import (
    Deflate,
    Inflate,
    Plain,
    ZstdExpand,
    ZstdPack,
    inflate_page,
)

PAGE = bytes(range(256)) * 16
NOISE = random.Random(7).randbytes(128 * 4096)  # noqa: S311

PAIRS = [
    pytest.param(Plain, Plain, id="none"),
    pytest.param(Deflate, Inflate, id="zlib"),
    pytest.param(ZstdPack, ZstdExpand, id="zstd"),
]
methods = pytest.mark.parametrize(("pack", "expand"), PAIRS)
compressed = pytest.mark.parametrize(("pack", "expand"), PAIRS[1:])


@methods
def test_every_packet_of_a_stream_expands_on_its_own(pack, expand):
    sender, receiver = pack(), expand()
    for content in (PAGE, NOISE, bytes(128 * 4096), PAGE * 128, NOISE[:4096], PAGE):
        payload = sender.pack(content)
        assert len(payload) <= 1 << 20
        assert receiver.expand(payload, len(content)) == content


@methods
@settings(max_examples=30)
@given(st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=6))
def test_any_content_comes_back(pack, expand, contents):
    sender, receiver = pack(), expand()
    for content in contents:
        assert receiver.expand(memoryview(sender.pack(content)), len(content)) == content


@pytest.mark.parametrize("level", [0, 1, 9])
def test_zlib_levels_expand(level):
    assert Inflate().expand(Deflate(level).pack(PAGE), 4096) == PAGE


@pytest.mark.parametrize("level", [1, 3, 19, 20])
def test_zstd_levels_expand(level):
    assert ZstdExpand().expand(ZstdPack(level).pack(PAGE), 4096) == PAGE


def test_packets_of_a_zlib_stream_share_its_window():
    sender = Deflate()
    first, second = sender.pack(NOISE[:4096]), sender.pack(NOISE[:4096])
    assert len(second) < len(first) // 10
    with pytest.raises(StreamError, match="expected a zlib stream"):
        Inflate().expand(second, 4096)


@methods
@pytest.mark.parametrize("size", [4095, 4097, 1, 8192])
def test_other_size_than_announced_is_refused(pack, expand, size):
    with pytest.raises(StreamError, match=rf"expected {size} bytes .*, found \d+"):
        expand().expand(pack().pack(PAGE), size)


@compressed
def test_empty_payload_is_refused(pack, expand):
    receiver = expand()
    with pytest.raises(StreamError, match="expected 4096 bytes after decompression, found 0"):
        receiver.expand(b"", 4096)


@compressed
def test_cut_payload_is_refused(pack, expand):
    payload = pack().pack(NOISE[:4096])
    for cut in (100, 4000, len(payload) - 1):
        with pytest.raises(StreamError, match="expected 4096 bytes after decompression, found"):
            expand().expand(payload[:-cut], 4096)


@compressed
def test_junk_is_refused(pack, expand):
    with pytest.raises(StreamError, match=r"expected a z(lib|std) stream, found"):
        expand().expand(NOISE[:4096], 4096)


@compressed
def test_junk_behind_a_packet_is_refused(pack, expand):
    payload = pack().pack(PAGE) + b"\xff" * 100
    with pytest.raises(StreamError):
        expand().expand(payload, 4096)


@pytest.mark.parametrize("junk", [b"", b"junk"])
def test_zlib_stream_that_ends_is_refused(junk):
    with pytest.raises(StreamError, match="expected a zlib stream without end"):
        Inflate().expand(zlib.compress(PAGE) + junk, 4096)


def test_packets_may_be_zstd_frames_of_their_own():
    receiver = ZstdExpand()
    for content in (PAGE, NOISE):
        assert receiver.expand(zstandard.compress(content), len(content)) == content


BOMB = bytes(64 << 20)


@pytest.mark.parametrize(
    ("payload", "expand"),
    [
        pytest.param(Deflate(9).pack(BOMB), Inflate, id="zlib"),
        pytest.param(ZstdPack(19).pack(BOMB), ZstdExpand, id="zstd"),
    ],
)
def test_bomb_is_refused_without_expanding_it(payload, expand):
    assert len(payload) < 1 << 17
    receiver = expand()
    tracemalloc.start()
    try:
        with pytest.raises(StreamError, match=r"expected 524288 bytes .* or more"):
            receiver.expand(payload, 512 << 10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3 << 20


def test_zstd_window_above_the_largest_of_qemu_is_refused():
    parameters = zstandard.ZstdCompressionParameters(window_log=26)
    sender = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    payload = sender.compress(PAGE) + sender.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(StreamError, match=r"expected a zstd stream, found .*memory"):
        ZstdExpand().expand(payload, 4096)


@pytest.mark.parametrize("level", range(10))
def test_page_expands_at_every_level(level):
    for page in (PAGE, NOISE[:4096], bytes(4096)):
        assert inflate_page(memoryview(zlib.compress(page, level)), 4096) == page


# What is wrong, the payload, a part of the message.
BROKEN_PAGES = [
    ("nothing", b"", "4096 bytes after decompression, found 0"),
    ("a cut end", zlib.compress(PAGE)[:-1], "one complete zlib stream"),
    ("cut content", zlib.compress(NOISE[:4096])[:-100], "4096 bytes after decompression"),
    ("a short page", zlib.compress(PAGE[:-1]), "found 4095"),
    ("a long page", zlib.compress(PAGE + b"x"), "found 4097"),
    ("two pages", zlib.compress(PAGE * 2), "found 4097 or more"),
    ("junk behind it", zlib.compress(PAGE) + b"x", "one complete zlib stream"),
    ("a wrong check sum", zlib.compress(PAGE)[:-4] + bytes(4), "incorrect data check"),
    ("no zlib", b"junk", "incorrect header check"),
    ("a flushed stream", Deflate().pack(PAGE), "one complete zlib stream"),
]


@pytest.mark.parametrize(
    ("wrong", "payload", "message"), BROKEN_PAGES, ids=[b[0] for b in BROKEN_PAGES]
)
def test_page_is_refused_with(wrong, payload, message):
    with pytest.raises(StreamError, match=message):
        inflate_page(payload, 4096)


@compressed
@settings(max_examples=60)
@given(st.data())
def test_changed_payload_raises_nothing_else(pack, expand, data):
    sender, receiver = pack(), expand()
    for _ in range(3):
        payload = bytearray(sender.pack(PAGE[: data.draw(st.integers(1, 4096))]))
        for _ in range(data.draw(st.integers(0, 3))):
            payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
        try:
            receiver.expand(bytes(payload), 4096)
        except StreamError:
            return
