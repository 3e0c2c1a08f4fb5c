from __future__ import annotations

import zlib
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings

from tests.wire import strategies as some
from tests.wire.feeding import check_round_trip, check_truncation, read, read_in_every_way
from vmferry.errors import LimitExceeded, StreamError, TruncatedStream
from vmferry.pages.compression import Deflate, Inflate, ZstdExpand, ZstdPack
from vmferry.wire.multifd import (
    Hello,
    Method,
    MultifdReader,
    Packet,
    encode_header,
    pages_per_packet,
)
from vmferry.wire.ram import RamBlock

VM = UUID("00112233-4455-6677-8899-aabbccddeeff")
RAM = RamBlock("pc.ram", 0x2000000)
SMALL = RamBlock("s", 4096)
HELLO = Hello(VM, 2)
PAGE = bytes(range(256)) * 16
HEAD = 320 + 8 * 128


def channel(page_size=4096, *blocks):
    known = {block.name: block for block in blocks or (RAM, SMALL)}
    return lambda: MultifdReader(known, page_size=page_size)


def header(offsets=(), *, block=RAM, size=None, page_size=4096, **options):
    return encode_header(
        block if offsets else None,
        np.array(offsets, np.uint64),
        payload_size=len(offsets) * page_size if size is None else size,
        number=options.pop("number", 0),
        page_size=page_size,
        **options,
    )


def patched(data, at, value):
    value = bytes.fromhex(value)
    return data[:at] + value + data[at + len(value) :]


def test_initial_packet_is_read_and_written_as_captured():
    data = bytes.fromhex("11223344 00000001 00112233445566778899aabbccddeeff 02") + bytes(39)
    assert HELLO.encode() == data
    assert list(channel()().feed(data)) == [HELLO]
    check_truncation(channel(), data)


@pytest.mark.parametrize("room", ["of the reader", "all"])
@pytest.mark.parametrize("here", [0, 100, 2 * 4096])
def test_pages_may_bypass_the_reader(room, here):
    data = memoryview(HELLO.encode() + header([0, 8192]) + PAGE * 2 + header(sync=True))
    reader = MultifdReader({RAM.name: RAM}, bypass=True)
    at, found = 0, []
    while at < len(data):
        target = reader.room() if room == "of the reader" else reader.buffer.room()
        # All of the room at most, or up to a place in the first packet's pages.
        stop = len(data) if at > 64 + HEAD or room == "of the reader" else 64 + HEAD + here
        piece = data[at : min(stop, at + len(target))]
        target[: len(piece)] = piece
        reader.buffer.received(len(piece))
        at += len(piece)
        for event in reader.events():
            found.append(event)
            if isinstance(event, Packet) and event.missing:
                pages = bytes(event.payload) + bytes(data[at : at + event.missing])
                assert pages == PAGE * 2
                at += event.missing
                reader.buffer.bypassed(event.missing)
    assert [type(event) for event in found] == [Hello, Packet, Packet]
    assert found[1].normal.tolist() == [0, 8192]
    assert len(found[1].payload) == (0 if room == "of the reader" else here)
    assert (found[1].offset, found[2].offset) == (64, 64 + HEAD + 8192)
    assert found[2].sync
    assert reader.buffer.offset == len(data)


def test_compressed_pages_do_not_bypass_the_reader():
    payload = Deflate().pack(PAGE)
    data = HELLO.encode() + header([0], size=len(payload), method=Method.ZLIB) + payload
    _, packet = MultifdReader({RAM.name: RAM}, bypass=True).feed(data)
    assert (bytes(packet.payload), packet.missing) == (payload, 0)


def test_header_is_written_as_captured():
    offsets = [0, 0x6000, 0x7000] + [0x8000 + n * 0x1000 for n in range(125)]
    wire = header(offsets, number=2)
    assert len(wire) == HEAD
    assert wire[:64].hex(" ", 4) == (
        "11223344 00000001 00000000 00000080 00000080 00080000 00000000 00000002"
        " 00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000"
    )
    assert wire[64:320] == b"pc.ram".ljust(256, b"\0")
    assert wire[320:344].hex() == f"{0:016x}{0x6000:016x}{0x7000:016x}"


def test_packet_of_pages_comes_back():
    data = HELLO.encode() + header([0x3000, 0x1000, 0x1FFF000]) + PAGE * 3
    make = channel()
    outcome = read(make(), [data[i : i + 777] for i in range(0, len(data), 777)])
    assert outcome.error is None
    assert outcome.written == data
    assert outcome.finished
    name, packet = outcome.events[1]
    assert name == "Packet"
    assert packet["block"] == (
        "RamBlock",
        dict.fromkeys(("page_size", "address")) | {"name": "pc.ram", "length": 0x2000000},
    )
    assert (packet["normal"], packet["zero"]) == ([0x3000, 0x1000, 0x1FFF000], [])
    assert packet["payload"] == PAGE * 3
    assert (packet["sync"], packet["method"], packet["offset"]) == (False, Method.NONE, 64)


def test_every_offset_of_a_packet_is_a_cut():
    data = HELLO.encode() + header([0], block=SMALL) + PAGE + header(sync=True)
    check_round_trip(channel(), data)
    for size in (63, 65, 64 + 7, 64 + 8, 64 + HEAD - 1, 64 + HEAD, 64 + HEAD + 4095):
        assert isinstance(read(channel()(), [data[:size]]).error, TruncatedStream)


def test_channel_may_end_between_packets():
    for data in (HELLO.encode(), HELLO.encode() + header(sync=True)):
        outcome = read(channel()(), [data])
        assert (outcome.error, outcome.finished) == (None, True)


def test_channel_that_says_nothing_is_cut_off():
    assert isinstance(read(channel()(), []).error, TruncatedStream)


def test_empty_packet_may_say_anything_of_a_payload_it_does_not_have():
    stale = patched(header([0x1000] * 128), 16, "00000000")
    other = patched(header([0x1000], block=RamBlock("gone", 4096), size=1 << 31), 16, "00000000")
    odd = patched(patched(header(sync=True), 8, "00000011"), 320, "ff" * 8)
    data = HELLO.encode() + stale + other + odd
    events = check_round_trip(channel(), data)
    assert [packet["block"] for _, packet in events[1:]] == [None] * 3
    assert [packet["sync"] for _, packet in events[1:]] == [False, False, True]
    assert [packet["method"] for _, packet in events[1:]] == [Method.NONE] * 3


@pytest.mark.parametrize(
    ("method", "pack", "expand"),
    [(Method.ZLIB, Deflate, Inflate), (Method.ZSTD, ZstdPack, ZstdExpand)],
)
def test_sync_may_be_on_a_packet_of_compressed_pages(method, pack, expand):
    sender, receiver, data = pack(), expand(), HELLO.encode()
    for sync in (False, True, False):
        payload = sender.pack(PAGE * 2)
        data += header([0, 0x1000], size=len(payload), method=method, sync=sync) + payload
    data += header(method=method, sync=True)
    packets = [e for e in channel()().feed(data) if isinstance(e, Packet)]
    assert [p.sync for p in packets] == [False, True, False, True]
    assert [p.method for p in packets] == [method] * 3 + [Method.NONE]
    for packet in packets[:3]:
        assert receiver.expand(packet.payload, 8192) == PAGE * 2
    assert read(channel()(), [data]).written == data


def test_zero_pages_stand_behind_the_others():
    wire = header([0x1000, 0x2000, 0x3000], size=4096)
    wire = patched(patched(wire, 16, "00000001"), 32, "00000002")
    zero_only = patched(patched(header([0x5000, 0x4000]), 16, "00000000"), 32, "00000002")
    data = HELLO.encode() + wire + PAGE + zero_only
    first, second = (e for e in channel()().feed(data) if isinstance(e, Packet))
    assert (first.normal.tolist(), first.zero.tolist()) == ([0x1000], [0x2000, 0x3000])
    assert (second.normal.tolist(), second.zero.tolist()) == ([], [0x5000, 0x4000])
    assert second.block == RAM
    assert read(channel()(), [data]).written == data


@pytest.mark.parametrize("page_size", [1024, 4096, 8192, 16384, 65536])
def test_packets_of_every_page_size_come_back(page_size):
    count = pages_per_packet(page_size)
    assert count * page_size == 512 << 10
    offsets = [n * page_size for n in range(count)]
    data = HELLO.encode() + 2 * (header(offsets, page_size=page_size) + bytes(512 << 10))
    for size in (len(data), 100_000):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        outcome = read(channel(page_size)(), pieces)
        assert outcome.error is None
        assert outcome.written == data


@settings(max_examples=40)
@given(some.packets())
def test_any_packets_come_back(case):
    blocks, data, expected = case
    make = channel(1024, *blocks)
    outcome = read(make(), [data])
    assert outcome.error is None
    assert outcome.written == data
    found = [
        (p["block"][1]["name"], p["normal"], p["zero"], p["sync"]) if p["block"] else p["sync"]
        for name, p in outcome.events
        if name == "Packet"
    ]
    assert found == expected
    pieces = [data[i : i + 1500] for i in range(0, len(data), 1500)]
    assert read(make(), pieces).result() == outcome.result()


def test_blocks_may_be_told_behind_the_initial_packet():
    known: dict[str, RamBlock] = {}
    reader = MultifdReader(known)
    assert list(reader.feed(HELLO.encode() + header(sync=True)))
    known["pc.ram"] = RAM
    (packet,) = reader.feed(header([0]) + PAGE)
    assert isinstance(packet, Packet)
    assert packet.block is RAM


FULL = header([n * 4096 for n in range(128)])
BAD = [
    # What is wrong, the bytes up to the one that shows it, the error, its text.
    ("another magic", "11223345 00000001", StreamError, "a packet with magic 11223344 .*11223345"),
    ("another version", "11223344 00000002", StreamError, "version 1, found 11223344 and 2"),
    ("an unknown flag", patched(FULL, 8, "00040000"), StreamError, "sync and a .*found 0x40000"),
    ("the highest flag", patched(FULL, 8, "80000000"), StreamError, "found 0x80000000"),
    ("device state", patched(FULL, 8, "00000040"), StreamError, r"device state \(QEMU 10.0\)"),
    ("qpl", patched(FULL, 8, "00000008"), StreamError, "zlib or zstd, found compression qpl"),
    ("two methods", patched(FULL, 8, "00000006"), StreamError, "found compression number 0x6"),
    ("129 pages", patched(FULL, 16, "00000081"), StreamError, "at most 128 pages .*129 and 0"),
    ("2^32 - 1 pages", patched(FULL, 16, "ffffffff"), StreamError, "found 4294967295 and 0"),
    ("128 pages and a zero one", patched(FULL, 32, "00000001"), StreamError, "found 128 and 1"),
    ("2^32 - 1 zero pages", patched(FULL, 32, "ffffffff"), StreamError, "and 4294967295 zero"),
    ("a byte too little", patched(FULL, 20, "0007ffff"), StreamError, "524288 bytes for 128 pages"),
    ("a byte too much", patched(FULL, 20, "00080001"), StreamError, "found 524289"),
    ("no payload", header([0], size=0, method=Method.ZLIB), LimitExceeded, "1 to 1048576 bytes"),
    (
        "a payload above 1 MiB",
        header([0], size=(1 << 20) + 1, method=Method.ZSTD),
        LimitExceeded,
        "a payload of 1 to 1048576 bytes, found 1048577",
    ),
    ("no block", patched(FULL, 64, "00" * 256), StreamError, 'of the main channel, found ""'),
    ("an unknown block", header([0], block=RamBlock("x", 8192)), StreamError, 'found "x"'),
    ("a name of 256 bytes", patched(FULL, 64, "61" * 256), StreamError, "found .aaaa"),
    ("a name that is no text", patched(FULL, 64, "ff"), StreamError, r"\\xffc\.ram"),
    ("an odd offset", header([0, 0x1001]), StreamError, "4096 bytes up to 0x1fff000, found 0x1001"),
    ("an offset behind", header([0x2000000]), StreamError, "found 0x2000000"),
    ("an offset of 2^64 - 4096", header([(1 << 64) - 4096]), StreamError, "0xfffffffffffff000"),
    (
        "an offset of a zero page behind",
        patched(patched(header([0, 0x2000000], size=4096), 16, "00000001"), 32, "00000001"),
        StreamError,
        "found 0x2000000",
    ),
]


@pytest.mark.parametrize(("wrong", "wire", "kind", "message"), BAD, ids=[b[0] for b in BAD])
def test_packet_is_refused_with(wrong, wire, kind, message):
    before = HELLO.encode() + header(sync=True)
    data = before + (bytes.fromhex(wire) if isinstance(wire, str) else wire)
    outcome = read(channel()(), [data], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert type(outcome.error) is kind
    assert (outcome.place.offset, outcome.place.channel) == (len(before), "multifd")
    assert read_in_every_way(channel(), data).error is not None


HELLO_BYTES = HELLO.encode()
BAD_HELLOS = [
    ("QEVM", patched(HELLO_BYTES, 0, "5145564d")[:8], "an initial packet with magic 11223344"),
    ("version 2", patched(HELLO_BYTES, 4, "00000002")[:8], "version 1, found 11223344 and 2"),
    ("something behind the id", patched(HELLO_BYTES, 25, "01"), "zeros in the rest"),
    ("something at the end", patched(HELLO_BYTES, 63, "01"), "zeros in the rest"),
]


@pytest.mark.parametrize(("wrong", "wire", "message"), BAD_HELLOS, ids=[b[0] for b in BAD_HELLOS])
def test_initial_packet_is_refused_with(wrong, wire, message):
    outcome = read(channel()(), [wire], end=False)
    with pytest.raises(StreamError, match=message):
        raise outcome.error or AssertionError("not refused")
    assert outcome.place.offset == 0


def test_block_of_less_than_a_page_has_none():
    make = channel(4096, RamBlock("pc.ram", 1024))
    error = read(make(), [HELLO.encode() + header([0])], end=False).error
    assert "a block of less than a page" in str(error)


def test_junk_inside_a_packet_is_the_decompressors_to_refuse():
    payload = zlib.compress(PAGE)
    data = HELLO.encode() + header([0], size=len(payload), method=Method.ZLIB) + payload
    assert read(channel()(), [data]).error is None
