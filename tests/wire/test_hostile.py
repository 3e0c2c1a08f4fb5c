"""Memory and time: neither follows from what the peer says, only from what it sends."""

from __future__ import annotations

import tracemalloc
from uuid import UUID

import pytest

from tests.pages.twins import PAGE, record
from tests.wire.feeding import read
from tests.wire.streams import (
    BLOCKS,
    CONFIGURATION,
    END,
    HEADER,
    RAM,
    TAIL,
    K,
    described,
    end,
    join,
    part,
    start,
)
from vmferry.wire.commands import PostcopyAdvise
from vmferry.wire.layout import Kind
from vmferry.wire.multifd import Hello, MultifdReader
from vmferry.wire.ram import RamBlock
from vmferry.wire.reader import StreamReader
from vmferry.wire.return_path import ReturnPathReader
from vmferry.wire.sections import SectionStart

MIB = 1 << 20
AT_RAM = join(HEADER, CONFIGURATION, start(2, BLOCKS, END), b"\2\0\0\0\2")
S390 = SectionStart(1, "s390-storage_attributes", 0, 0)
HELLO = Hello(UUID(int=0), 0).encode()


def reader():
    return StreamReader(max_ram=1 << 62)


def answers():
    return ReturnPathReader(max_bitmap=1 << 40)


def channel():
    return MultifdReader({"a": RamBlock("a", 1 << 40)})


# What is announced, and the input up to the announcement.
GREEDY = [
    ("the largest machine type", reader, HEADER + b"\7\0\0\0\xff"),
    (
        "a package of 256 MiB",
        reader,
        join(HEADER, CONFIGURATION, PostcopyAdvise(K, K)) + bytes.fromhex("0800070004 10000000"),
    ),
    (
        "RAM of 2^62",
        reader,
        join(HEADER, CONFIGURATION, start(2, footer=False)) + b"@" + bytes(6) + b"\4",
    ),
    ("a compressed page", reader, AT_RAM + bytes.fromhex("0000000000000100 01 61 0000040d")),
    (
        "16 MiB of attributes",
        reader,
        join(HEADER, S390) + bytes.fromhex("000000000000100200000000 01000000"),
    ),
    ("a description of 16 MiB", reader, join(HEADER, CONFIGURATION, RAM) + b"\0\6\1\0\0\0{"),
    (
        "a description of 16 MiB behind devices",
        reader,
        join(HEADER, CONFIGURATION, RAM, described.section(1, "d", b"x")) + b"\0\6\1\0\0\0{",
    ),
    ("a bitmap of 1 TiB", answers, bytes.fromhex("0005 0002 01 61 0000010000000000")),
    (
        "a multifd payload of 1 MiB",
        channel,
        HELLO
        + bytes.fromhex("11223344 00000001 00000002 00000080 00000001 00100000")
        + bytes(40)
        + b"a".ljust(256 + 1024, b"\0"),
    ),
]


@pytest.mark.parametrize(("what", "make", "data"), GREEDY, ids=[g[0] for g in GREEDY])
def test_nothing_is_allocated_on_the_announcement_of(what, make, data):
    target = make()
    tracemalloc.start()
    try:
        outcome = read(target, [data, b"x" * 10], end=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert outcome.error is None
    assert not outcome.finished
    assert peak < MIB


def test_buffer_holds_no_more_than_four_times_what_came():
    target = reader()
    lead = join(HEADER, CONFIGURATION, PostcopyAdvise(K, K)) + bytes.fromhex("0800070004 10000000")
    read(target, [lead], end=False)
    tracemalloc.start()
    try:
        for _ in range(64):
            read(target, [bytes(64 << 10)], end=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 64 * (64 << 10)


# Input that is long in one respect; read byte by byte, so that anything quadratic shows.
LONG = [
    ("devices", join(HEADER, CONFIGURATION, RAM, described.section(0, "d", bytes(200_000)))),
    (
        "a description",
        join(HEADER, CONFIGURATION, RAM, described.section(0, "d", b"x"))
        + b"\0\6"
        + (200_000).to_bytes(4)
        + b'{"devices": ['
        + b" " * 199_000,
    ),
    (
        "a package",
        join(HEADER, CONFIGURATION, PostcopyAdvise(K, K))
        + bytes.fromhex("0800070004 00100000 0800040000 04")
        + bytes(200_000),
    ),
    ("empty parts", join(HEADER, CONFIGURATION, start(2, BLOCKS, END), part(2, END) * 10_000)),
    (
        "pages",
        AT_RAM + record(PAGE, 0, bytes(K), b"\1a") + record(PAGE, K, b"\1" * K) * 200,
    ),
    ("pings", join(HEADER, CONFIGURATION, b"\x08\0\1\0\0", b"\x08\0\2\0\4\0\0\0\7" * 20_000)),
    (
        "footers that are none",
        join(HEADER, CONFIGURATION, RAM)
        + bytes([Kind.FULL])
        + bytes.fromhex("00000007 01 64 00000000 00000001")
        + bytes.fromhex("7e00000007") * 40_000,
    ),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("what", "data"), LONG, ids=[entry[0] for entry in LONG])
def test_time_is_linear_in(what, data):
    outcome = read(StreamReader(), [data[at : at + 1] for at in range(len(data))], end=False)
    assert outcome.error is None


def test_stream_with_nothing_but_parts_ends():
    data = join(
        HEADER, CONFIGURATION, start(2, BLOCKS, END), part(2, END) * 1000, end(2, END), TAIL
    )
    assert read(StreamReader(), [data]).finished
