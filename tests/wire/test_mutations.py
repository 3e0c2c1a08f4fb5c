"""Real streams and made-up ones, changed at random: nothing but a StreamError comes of it."""

from __future__ import annotations

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.fuzz_stream import check, seeds
from tests.support.recorded import recorded
from tests.wire.feeding import check_invariant
from tests.wire.streams import OPEN_STREAMS, STREAMS
from vmferry.wire.multifd import MultifdReader
from vmferry.wire.ram import RamBlocks
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.return_path import ReturnPathReader

SMALL = [*STREAMS.values(), *OPEN_STREAMS.values()]
RECORDED = ("pc-multifd", "pc-compress", "ppc-g3beige", "pc-ignore-shared", "pc-postcopy")
VALUES = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0", b"\1", b"\x7e", b"\xff"]


def reader():
    return StreamReader(max_ram=1 << 30, tolerate=Tolerate.NO_END)


@functools.cache
def places(data):
    """Where events begin and end: next to them lies what is not a page."""
    found, target = {0, len(data)}, reader()
    for start in range(0, len(data), 1000):
        for _ in target.feed(data[start : start + 1000]):
            found.add(target.buffer.offset)
    return sorted(found)


@st.composite
def changed(draw, data, around):
    """*data* with one to three changes near the places *around*."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = max(0, draw(st.sampled_from(around)) + draw(st.integers(-20, 40)))
        value = draw(st.sampled_from(VALUES) | st.binary(min_size=1, max_size=3))
        match draw(st.sampled_from(("put", "put", "insert", "drop", "repeat", "cut"))):
            case "put":
                out[at : at + len(value)] = value
            case "insert":
                out[at:at] = value
            case "drop":
                del out[at : at + draw(st.integers(1, 40))]
            case "repeat":
                out[at:at] = out[at : at + draw(st.integers(1, 40))]
            case "cut":
                del out[max(at, 1) :]
    return bytes(out)


@settings(max_examples=1000)
@given(st.sampled_from(SMALL).flatmap(lambda data: changed(data, places(data))), st.integers(0, 99))
def test_changed_small_stream_is_read_or_refused(data, cut):
    check_invariant(reader, data, cut)


recordings = st.sampled_from(RECORDED).map(lambda name: bytes(recorded(name)[0].sent))


@settings(max_examples=200)
@given(recordings.flatmap(lambda data: changed(data, places(data))), st.integers(0, 99))
def test_changed_recording_is_read_or_refused(data, cut):
    check_invariant(reader, data, cut)


@functools.cache
def packets():
    """A multifd channel as recorded, and the RAM blocks of its machine."""
    main, _, channel, *_ = recorded("pc-multifd-zlib")
    (blocks,) = (event for event in StreamReader().feed(main.sent) if isinstance(event, RamBlocks))
    return bytes(channel.sent), {block.name: block for block in blocks.blocks}


@settings(max_examples=300)
@given(st.data(), st.integers(0, 99))
def test_changed_multifd_channel_is_read_or_refused(choice, cut):
    data, blocks = packets()
    heads = [at for at in range(len(data)) if data.startswith(b"\x11\x22\x33\x44", at)]
    check_invariant(lambda: MultifdReader(blocks), choice.draw(changed(data, heads)), cut)


@settings(max_examples=300)
@given(st.data(), st.integers(0, 99))
def test_changed_answers_are_read_or_refused(choice, cut):
    data = bytes(recorded("pc-postcopy")[0].answered)
    around = list(range(0, len(data), 4))
    check_invariant(ReturnPathReader, choice.draw(changed(data, around)), cut)


@settings(max_examples=300)
@given(st.sampled_from(seeds()).flatmap(lambda data: changed(data, [0, 2, 10, 40, len(data)])))
def test_what_the_fuzzer_starts_from_holds_when_changed(data):
    check(data)
