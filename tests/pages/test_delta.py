from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.blocks import ONES, TWOS, ZEROS, memory_of, numbers
from tests.pages.twins import (
    PAGE,
    XBZRLE,
    ZERO,
    both,
    compiled,
    needs_compiled,
    plain,
    record,
)
from tests.pages.xbzrle import encode
from vmferry.errors import UsageError
from vmferry.pages import XbzrleCache

NAME = b"\x06pc.ram"
RAMP = bytes(range(256)) * 16


class Sender:
    """Packs pages of one block through a cache, with no more to say than the test wants."""

    def __init__(self, kernels, *pages, slots=8, base=0, page_size=4096):
        self.kernels = kernels
        self.memory = memory_of(*pages)
        self.page_size = page_size
        self.cache = XbzrleCache(slots * page_size, page_size)
        self.base = base

    def write(self, page, content, at=0):
        start = page * self.page_size + at
        self.memory[start : start + len(content)] = np.frombuffer(content, np.uint8)

    def pack(self, *pages, generation=1, named=False, last_stage=False, room=1 << 20, first=0):
        out = bytearray(room)
        done = self.kernels.pack_pages_xbzrle(
            self.cache,
            self.memory,
            numbers(*pages),
            first,
            self.page_size,
            NAME,
            named,
            self.base,
            generation,
            last_stage,
            out,
        )
        return bytes(out[: done.size]), done

    def wire(self, *pages, **more):
        return self.pack(*pages, **more)[0]

    def cached(self):
        return {
            int(tag): self.cache.content[slot * self.page_size :][: self.page_size].tobytes()
            for slot, tag in enumerate(self.cache.tags)
            if tag != (1 << 64) - 1
        }


@both
def test_page_goes_whole_first_then_as_what_changed_then_not_at_all(kernels):
    sender = Sender(kernels, ZEROS, RAMP)
    assert sender.wire(1) == record(PAGE, 0x1000, RAMP)
    sender.write(1, b"\xaa\xbb", at=100)
    assert sender.wire(1) == record(XBZRLE, 0x1000, b"\x64\x02\xaa\xbb")
    assert sender.wire(1) == b""


@both
def test_first_record_that_is_written_carries_the_name(kernels):
    sender = Sender(kernels, RAMP, RAMP)
    sender.wire(0, 1)
    sender.write(1, b"\1")
    assert sender.wire(0, 1, named=True) == record(XBZRLE, 0x1000, b"\0\1\1", NAME)


@both
def test_zero_page_empties_what_the_cache_has_of_it(kernels):
    sender = Sender(kernels, RAMP, ZEROS)
    sender.wire(0)
    sender.write(0, ZEROS)
    assert sender.wire(0) == record(ZERO, 0, b"\0")
    sender.write(0, b"\x90")
    assert sender.wire(0) == record(XBZRLE, 0, b"\0\1\x90")


@both
def test_page_that_changed_everywhere_goes_whole_and_is_kept(kernels):
    sender = Sender(kernels, ONES)
    sender.wire(0)
    sender.write(0, TWOS)
    assert sender.wire(0) == record(PAGE, 0, TWOS)
    sender.write(0, b"\7", at=4095)
    assert sender.wire(0) == record(XBZRLE, 0, b"\xff\x1f\1\7")


@both
def test_slot_is_taken_over_when_its_page_is_two_generations_old(kernels):
    sender = Sender(kernels, ONES, TWOS, slots=1)
    sender.wire(0, generation=5)
    for generation in (5, 6):
        sender.wire(1, generation=generation)
        assert sender.cached() == {0: ONES}
    sender.wire(1, generation=7)
    assert sender.cached() == {1: TWOS}


@both
def test_use_makes_a_page_young_even_where_nothing_changed(kernels):
    sender = Sender(kernels, ONES, TWOS, slots=1)
    for generation in range(1, 9):
        sender.wire(0, generation=generation)
        sender.wire(1, generation=generation)
    assert sender.cached() == {0: ONES}


@both
def test_zero_page_takes_no_slot_from_a_young_page(kernels):
    sender = Sender(kernels, ONES, ZEROS, slots=1)
    sender.wire(0, 1, generation=1)
    assert sender.cached() == {0: ONES}
    sender.wire(1, generation=3)
    assert sender.cached() == {1: ZEROS}


@both
def test_slot_is_that_of_the_page_in_all_of_ram(kernels):
    sender = Sender(kernels, ONES, TWOS, slots=4, base=1002)
    sender.wire(0, 1)
    assert sender.cached() == {1002: ONES, 1003: TWOS}
    assert sender.cache.tags.tolist()[2:] == [1002, 1003]


@both
def test_last_stage_uses_what_is_there_and_adds_nothing(kernels):
    sender = Sender(kernels, ONES, RAMP, ONES, RAMP, ZEROS)
    sender.wire(0, 1, 2)
    sender.write(1, b"\5", at=7)
    sender.write(2, ZEROS)
    wire, done = sender.pack(0, 1, 2, 3, 4, last_stage=True)
    assert wire == (
        record(XBZRLE, 0x1000, b"\7\1\5")
        + record(ZERO, 0x2000, b"\0")
        + record(PAGE, 0x3000, RAMP)
        + record(ZERO, 0x4000, b"\0")
    )
    assert sender.cached() == {0: ONES}
    assert done[2:] == (2, 1, 2, 6, 1, 0)


@both
def test_counts_are_those_of_qemu(kernels):
    sender = Sender(kernels, ONES, RAMP, ONES, ZEROS)
    assert sender.pack(0, 1, 2, 3)[1] == (4, 3 * 4104 + 9, 1, 3, 0, 0, 3, 0)
    sender.write(0, TWOS)
    sender.write(1, b"\xaa\xbb", at=100)
    # Found are all three; the bytes are a page that did not fit, and 1 + 2 + 4 behind a word.
    assert sender.pack(0, 1, 2)[1] == (3, 4104 + 15, 0, 1, 3, 4096 + 7, 0, 1)
    sender.write(1, b"\xcc", at=100)
    named = sender.pack(1, named=True)[1]
    assert (named.size, named.bytes) == (8 + 7 + 6, 7 + 6)
    assert named.pages == 1


@both
def test_packing_stops_where_a_whole_page_might_not_fit(kernels):
    sender = Sender(kernels, ONES, TWOS, ZEROS)
    whole = 8 + 3 + 4096
    assert sender.pack(0, 1, 2, room=whole - 1) == (b"", (0, 0, 0, 0, 0, 0, 0, 0))
    assert sender.cached() == {}
    assert sender.pack(0, 1, 2, room=whole)[1].following == 1
    assert sender.pack(0, 1, 2, room=whole + 7, named=True, first=1)[1].following == 2
    assert sender.pack(0, 1, 2, room=whole + 7, named=True, first=2)[1].following == 3
    assert sender.pack(0, 1, 2, first=7) == (b"", (7, 0, 0, 0, 0, 0, 0, 0))


@both
def test_what_does_not_fit_is_refused(kernels):
    sender = Sender(kernels, ONES, TWOS)
    with pytest.raises(ValueError, match="outside"):
        sender.pack(0, 2)
    with pytest.raises(ValueError, match="before the first"):
        sender.pack(0, first=-1)
    for size in (0, 1024, 8192, 5000):
        sender.page_size = size
        with pytest.raises(ValueError, match="page size"):
            sender.pack(0)
    assert Sender(kernels, b"\1" * 16384, page_size=16384).pack(0)[1].normal == 1
    with pytest.raises(ValueError, match="16384"):
        Sender(kernels, b"\1" * 32768, page_size=32768).pack(0)


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 3 * 4096, 12000])
def test_size_that_is_no_power_of_two_of_a_page_or_more_is_refused(size):
    cache = XbzrleCache(4096, 4096)
    with pytest.raises(UsageError, match="power of two of at least one page"):
        XbzrleCache(size, 4096)
    with pytest.raises(UsageError, match=str(size)):
        cache.resize(size)
    assert cache.size == 4096


def test_size_beyond_all_memory_is_refused_and_changes_nothing():
    sender = Sender(plain, ONES)
    sender.wire(0)
    with pytest.raises(UsageError, match="no memory"):
        sender.cache.resize(1 << 60)
    assert sender.cached() == {0: ONES}
    assert sender.cache.size == 8 * 4096


def test_larger_cache_keeps_every_page():
    sender = Sender(plain, *[ONES, RAMP] * 4, slots=8)
    sender.wire(*range(8))
    sender.cache.resize(32 * 4096)
    assert sender.cached() == {page: (ONES, RAMP)[page % 2] for page in range(8)}
    assert sender.cache.size == 32 * 4096


def test_smaller_cache_keeps_the_pages_used_last():
    sender = Sender(plain, *[bytes([page]) * 4096 for page in range(1, 9)])
    sender.wire(*range(8), generation=1)
    sender.wire(1, 2, generation=2)
    sender.wire(7, generation=3)
    sender.cache.resize(4 * 4096)
    assert sender.cached() == {page: bytes([page + 1]) * 4096 for page in (1, 2, 7)} | {
        page: bytes([page + 1]) * 4096 for page in sender.cached() if page % 4 == 0
    }
    assert len(sender.cached()) == 4
    sender.write(2, b"\0")
    assert sender.wire(2, generation=3) == record(XBZRLE, 0x2000, b"\0\1\0")


steps = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1023), st.binary(max_size=9))),
        st.lists(st.integers(0, 5), max_size=8),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=6,
)


@needs_compiled
@given(steps, st.sampled_from((1, 2, 4, 8)), st.integers(0, 5000))
def test_twins_pack_alike(script, slots, room):
    content = [bytes([page]) * 1024 for page in range(6)]
    senders = [Sender(k, *content, slots=slots, page_size=1024) for k in (compiled, plain)]
    generation = 1
    for writes, pages, later, last_stage in script:
        generation += later
        results = []
        for sender in senders:
            for page, at, piece in writes:
                sender.write(page, piece[: 1024 - at], at=at)
            done = sender.pack(*pages, generation=generation, last_stage=last_stage, room=room)
            cache = sender.cache
            results.append((done, sender.cached(), cache.tags.tolist(), cache.generations.tolist()))
        assert results[0] == results[1]


@both
@given(st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=300)), max_size=20))
def test_record_is_what_the_encoder_says(kernels, changes):
    sender = Sender(kernels, RAMP)
    sender.wire(0)
    for at, piece in changes:
        sender.write(0, piece[: 4096 - at], at=at)
    after = sender.memory.tobytes()
    wire = encode(RAMP, after)
    expected = b"" if wire == b"" else record(XBZRLE, 0, wire) if wire else record(PAGE, 0, after)
    if not any(after):
        expected = record(ZERO, 0, b"\0")
    assert sender.wire(0) == expected
