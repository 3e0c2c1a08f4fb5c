"""Whole streams, small enough to be cut everywhere: pages of 1 KiB, two RAM blocks, two devices."""

from __future__ import annotations

from typing import Any

from tests.pages.twins import COMPRESS, PAGE, XBZRLE, ZERO, record
from tests.wire import described
from vmferry.wire.bitmap import BitmapBits, BitmapComplete, BitmapsEnd, BitmapStart
from vmferry.wire.commands import (
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
    RamDiscard,
)
from vmferry.wire.configuration import Configuration
from vmferry.wire.disk import DiskChunk, DiskEnd, DiskProgress
from vmferry.wire.layout import BitmapFlag, Kind
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

K = 1024
HEADER = Header().encode()
CONFIGURATION = Configuration("board-7.2", page_bits=10).encode()
BLOCKS = RamBlocks((RamBlock("a", 4 * K), RamBlock("bb", 2 * K)))
END = RamEnd().encode()
EOF = EndOfStream().encode()
NAMES = {1: "block", 2: "ram", 3: "dirty-bitmap"}
BOTH = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME


def join(*parts: Any) -> bytes:
    """Bytes and events, one behind the other."""
    return b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)


def section(kind: Kind, number: int, *body: Any, footer: bool = True) -> bytes:
    """A START, PART or END of one of NAMES."""
    name, version = NAMES[number], 4 if number == 2 else 1
    head = {
        Kind.START: SectionStart(number, name, 0, version),
        Kind.PART: SectionPart(number, name),
        Kind.END: SectionEnd(number, name),
    }[kind]
    return join(head, *body, *([SectionFooter(number)] if footer else []))


def start(number: int, *body: Any, **options: bool) -> bytes:
    return section(Kind.START, number, *body, **options)


def part(number: int, *body: Any, **options: bool) -> bytes:
    return section(Kind.PART, number, *body, **options)


def end(number: int, *body: Any, **options: bool) -> bytes:
    return section(Kind.END, number, *body, **options)


PAGES = join(
    record(PAGE, 0, b"\x53\xff" * 512, b"\1a"),
    record(ZERO, K, b"\0"),
    record(COMPRESS, 2 * K, b"z" * 20),
    record(ZERO, 0, b"\0", b"\2bb"),
    record(XBZRLE, 0, b"\0\1\x90", b"\1a"),
)
LAST_PAGES = join(record(ZERO, 3 * K, b"\0"), record(XBZRLE, 0, b""))
RAM = join(start(2, BLOCKS, END), part(2, PAGES, END), part(2, END), end(2, LAST_PAGES, END))

STATE = described.vmsd("timer", described.field("ticks", "int64", 8))
BIG = described.vmsd(
    "fw_cfg",
    described.field("buffer", "buffer", 40),
    subsections=(described.vmsd("fw_cfg/dma", described.field("dma", "uint64", 8), version=0),),
)
DESCRIPTION = described.description(
    described.device("timer", STATE), described.device("fw_cfg", BIG), page_size=K
)


def devices(footer: bool = True) -> bytes:
    """The sections that DESCRIPTION describes."""
    return join(
        described.section(0, "timer", described.fill(STATE), footer=footer),
        described.section(9, "fw_cfg", described.fill(BIG), footer=footer),
    )


TAIL = described.tail(devices(), DESCRIPTION)

BITMAPS = join(
    start(3, BitmapStart("n", "b", BOTH, 512, enabled=True, persistent=False), BitmapsEnd())
)
BITMAPS_END = end(
    3,
    BitmapBits("n", "b", BitmapFlag(0), 0, 8, b"\xaa"),
    BitmapComplete("n", "b", BitmapFlag(0)),
    BitmapsEnd(),
)
DISKS = start(1, DiskEnd())
DISKS_END = end(1, DiskChunk("d", 2048, None), DiskProgress(100), DiskEnd())
PACKAGE = Package(
    join(PostcopyListen(), devices(), Ping(3), PostcopyRun()),
)
EARLY = described.section(7, "0000:00:02.0/virtio-mem-device-early", b"\1" * 44)

# Name, what the stream is made of.
STREAMS = {
    "plain": join(HEADER, CONFIGURATION, RAM, TAIL),
    "return path": join(HEADER, CONFIGURATION, OpenReturnPath(), Ping(1), RAM, TAIL),
    "postcopy announced": join(
        HEADER, CONFIGURATION, OpenReturnPath(), Ping(1), PostcopyAdvise(K, K), RAM, TAIL
    ),
    "disks and bitmaps": join(
        HEADER,
        CONFIGURATION,
        DISKS,
        start(2, BLOCKS, END),
        BITMAPS,
        part(1, DiskChunk("d", 0, None), DiskEnd()),
        part(2, PAGES, END),
        DISKS_END,
        end(2, END),
        BITMAPS_END,
        TAIL,
    ),
    "no footers": join(
        HEADER,
        Configuration("board-2.3", page_bits=10),
        start(2, BLOCKS, END, footer=False),
        part(2, PAGES, END, footer=False),
        end(2, END, footer=False),
        described.tail(devices(footer=False), DESCRIPTION),
    ),
    "early device": join(
        HEADER,
        CONFIGURATION,
        start(2, BLOCKS, END),
        EARLY,
        part(2, PAGES, END),
        end(2, END),
        described.tail(
            devices(),
            described.description(
                described.device("0000:00:02.0/virtio-mem-device-early", 44),
                described.device("timer", STATE),
                described.device("fw_cfg", BIG),
                page_size=K,
            ),
        ),
    ),
    "postcopy": join(
        HEADER,
        CONFIGURATION,
        OpenReturnPath(),
        Ping(1),
        PostcopyAdvise(K, K),
        start(2, BLOCKS, END),
        part(2, PAGES, END),
        RamDiscard("a", ((0, K),)),
        Ping(2),
        PACKAGE,
        Ping(4),
        part(2, record(PAGE, 0, b"\x90" * K, b"\1a"), END),
        end(2, END),
        EOF,
    ),
}
# These end where their channel does: without a description nothing else tells.
OPEN_STREAMS = {
    "no description": join(HEADER, CONFIGURATION, RAM, devices(), EOF),
    "no devices": join(HEADER, CONFIGURATION, RAM, EOF),
}
