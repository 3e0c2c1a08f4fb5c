"""Valid events of every kind, for hypothesis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from tests.pages.twins import COMPRESS, CONTINUE, PAGE, XBZRLE, ZERO, record
from tests.wire import described, streams
from vmferry.pages.compression import Deflate, Plain, ZstdPack
from vmferry.wire.bitmap import BitmapBits, BitmapComplete, BitmapsEnd, BitmapStart
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import (
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
    SwitchoverStart,
)
from vmferry.wire.configuration import Configuration
from vmferry.wire.disk import DiskChunk, DiskEnd, DiskProgress
from vmferry.wire.layout import BitmapFlag
from vmferry.wire.multifd import Hello, Method, encode_header
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd, RamFlush
from vmferry.wire.return_path import (
    HavePages,
    Pong,
    RequestPages,
    ResumeAck,
    Shut,
    SwitchoverAck,
)

names = st.one_of(
    st.sampled_from(("pc.ram", "pc.rom", "a", "ü", "n" * 255)),
    st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=40).filter(
        lambda name: name.isprintable()
    ),
)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)

configurations = st.builds(
    Configuration,
    machine=names,
    page_bits=st.none() | st.integers(10, 16),
    capabilities=st.lists(names, max_size=4, unique=True).map(tuple),
    uuid=st.none() | st.uuids(),
)

_ranges = u64.flatmap(
    lambda start: st.tuples(st.just(start), st.integers(1, (1 << 64) - start))
).filter(lambda pair: pair[1] < 1 << 64)

commands = st.one_of(
    st.sampled_from(
        (
            OpenReturnPath(),
            PostcopyAdvise(),
            PostcopyListen(),
            PostcopyRun(),
            EnableColo(),
            PostcopyResume(),
            SwitchoverStart(),
        )
    ),
    st.builds(Ping, u32),
    st.builds(PostcopyAdvise, u64, u64),
    st.builds(RamDiscard, names, st.lists(_ranges, min_size=1, max_size=12).map(tuple)),
    st.builds(ReceivedBitmap, names),
    st.binary(max_size=600).map(
        lambda devices: Package(b"\x08\0\4\0\0\4" + devices + b"\x08\0\5\0\0", 9)
    ),
)


@st.composite
def ram_bodies(draw):
    """A block list and pages: page size, bytes, and *(block, word, payload)* of each page."""
    page_size = draw(st.sampled_from((1024, 1024, 4096)))
    sizes = draw(st.dictionaries(names, st.integers(1, 5), min_size=1, max_size=4))
    blocks = RamBlocks(tuple(RamBlock(name, n * page_size) for name, n in sizes.items()))
    out, expected, current = [blocks.encode()], [], None
    for _ in range(draw(st.integers(0, 12))):
        name = draw(st.sampled_from(list(sizes)))
        kind = draw(st.sampled_from((ZERO, ZERO, PAGE, XBZRLE, COMPRESS)))
        most = {ZERO: 1, PAGE: page_size}.get(kind)
        size = most or draw(st.integers(0, page_size))
        payload = bytes([0 if kind == ZERO else draw(st.integers(0, 255))]) * size
        offset = draw(st.integers(0, sizes[name] - 1)) * page_size
        named = name != current or draw(st.booleans())
        out.append(record(kind, offset, payload, encode_name(name) if named else None))
        expected.append((name, offset | kind | (0 if named else CONTINUE), payload))
        current = name
        if draw(st.integers(0, 9)) == 0:
            out.append(RamFlush().encode())
    return page_size, b"".join(out) + RamEnd().encode(), expected


_chunks = st.builds(
    DiskChunk, names, st.integers(0, (1 << 43) - 1).map(lambda n: n * 2048), st.none()
)
disk_bodies = st.lists(_chunks | st.builds(DiskProgress, st.integers(0, 100)), max_size=8).map(
    lambda records: [*records, DiskEnd()]
)


@st.composite
def bitmap_bodies(draw):
    """Records of one body of `dirty-bitmap`: some bitmaps, started, sent and completed."""
    bitmaps = draw(st.lists(st.tuples(names, names), min_size=1, max_size=3, unique=True))
    granularity = {key: 1 << draw(st.integers(9, 31)) for key in bitmaps}
    records, before = [], ("", "")

    def naming(key):
        nonlocal before
        flags = BitmapFlag(0)
        for name, old, flag in zip(
            key, before, (BitmapFlag.NODE_NAME, BitmapFlag.BITMAP_NAME), strict=True
        ):
            if name != old or draw(st.booleans()):
                flags |= flag
        before = key
        return *key, flags

    for key in bitmaps:
        flags = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        records.append(BitmapStart(*naming(key), granularity[key], *flags))
    for key in draw(st.lists(st.sampled_from(bitmaps), max_size=6)):
        unit = granularity[key] // 512
        first = draw(st.integers(0, 1000)) * unit
        sectors = min(draw(st.integers(1, 300)) * unit, (1 << 32) - 1)
        size = (sectors + unit - 1) // unit + 7 >> 3
        data = None
        if draw(st.booleans()):
            data = draw(st.binary(min_size=size, max_size=-(-size // 32) * 32))
        records.append(BitmapBits(*naming(key), first, sectors, data))
    records += [BitmapComplete(*naming(key)) for key in bitmaps]
    return [*records, BitmapsEnd()]


_requests = _ranges.map(lambda pair: (pair[0], min(pair[1], (1 << 32) - 1)))
messages = st.one_of(
    st.builds(Shut, u32),
    st.builds(Pong, u32),
    st.builds(lambda pair, name: RequestPages(*pair, name), _requests, st.none() | names),
    st.builds(HavePages, names, st.integers(0, 30).map(lambda n: bytes(range(8)) * n)),
    st.sampled_from((ResumeAck(), SwitchoverAck())),
)


@st.composite
def packets(draw):
    """A multifd channel with pages of 1 KiB: the blocks, the bytes, what each packet says."""
    sizes = draw(st.dictionaries(names, st.integers(1, 40), min_size=1, max_size=3))
    blocks = [RamBlock(name, count * 1024) for name, count in sizes.items()]
    pack = {Method.ZLIB: Deflate(), Method.ZSTD: ZstdPack(), Method.NONE: Plain()}
    method = draw(st.sampled_from(list(pack)))
    out, expected = [Hello(draw(st.uuids()), draw(st.integers(0, 255))).encode()], []
    for _ in range(draw(st.integers(0, 5))):
        block, sync = draw(st.sampled_from(blocks)), draw(st.booleans())
        offset = st.integers(0, block.length // 1024 - 1).map(lambda n: n * 1024)
        normal = draw(st.lists(offset, max_size=4))
        zero = draw(st.lists(offset, max_size=3)) if draw(st.booleans()) else []
        pages = b"".join(bytes([draw(st.integers(0, 255))]) * 1024 for _ in normal)
        payload = pack[method].pack(pages) if normal else b""
        header = encode_header(
            block,
            np.array(normal + zero, np.uint64),
            payload_size=len(payload) if normal else draw(u32),
            number=draw(u64),
            page_size=1024,
            method=method,
            sync=sync,
        )
        counts = len(normal).to_bytes(4) + header[20:32] + len(zero).to_bytes(4)
        out += [header[:16], counts, header[36:], payload]
        expected.append((block.name, normal, zero, sync) if normal or zero else sync)
    return blocks, b"".join(out), expected


@st.composite
def whole_streams(draw):
    """Streams of all kinds of sections: the bytes, the devices as *(name, body)*, the page size."""
    made = draw(described.streams())
    page_size, ram, _ = draw(ram_bodies())
    configuration = draw(configurations.filter(lambda made: "mapped-ram" not in made.capabilities))
    capabilities = tuple(name for name in configuration.capabilities if name != "x-ignore-shared")
    configuration = replace(
        configuration, page_bits=page_size.bit_length() - 1, capabilities=capabilities
    )
    postcopy = PostcopyAdvise(page_size, page_size)
    commands = draw(st.sampled_from(((), (OpenReturnPath(), Ping(1)), (EnableColo(), postcopy))))
    bodies = {1: [streams.DiskEnd()], 2: [ram], 3: [streams.BitmapsEnd()]}
    chosen = draw(st.permutations((1, 3)).map(lambda order: [2, *order]))[: draw(st.integers(1, 3))]
    starts = [streams.start(n, *bodies[n], footer=made.footers) for n in chosen]
    parts = [
        streams.part(1, *draw(disk_bodies), footer=made.footers)
        if n == 1
        else streams.part(2, RamFlush(), RamEnd(), footer=made.footers)
        for n in draw(st.lists(st.sampled_from([n for n in chosen if n != 3]), max_size=3))
    ]
    last = {1: [DiskEnd()], 2: [RamEnd()], 3: draw(bitmap_bodies())}
    ends = [streams.end(n, *last[n], footer=made.footers) for n in chosen]
    text = described.description(*made.devices, page_size=page_size)
    data = streams.join(
        *(streams.HEADER, configuration, *commands, *starts, *parts, *ends),
        described.tail(made.sections, text),
    )
    devices = [
        (device["name"], body) for device, body in zip(made.devices, made.bodies, strict=True)
    ]
    return data, devices, page_size
