from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.blocks import ONES, TWOS, ZEROS, mapped, memory_of, numbers
from tests.pages.twins import (
    PAGE,
    PAGE_SIZES,
    ZERO,
    both,
    compiled,
    needs_compiled,
    plain,
    record,
)

NAME = b"\x06pc.ram"
PAGES = 64


def packed(kernels, memory, pages, *, named=True, room=1 << 20, **more):
    out = bytearray(room)
    following, size, zeros = kernels.pack_pages(memory, pages, 0, 4096, NAME, named, out, **more)
    return following, bytes(out[:size]), zeros


@both
def test_pages_become_records(kernels):
    memory = memory_of(ONES, ZEROS, TWOS, ZEROS)
    assert packed(kernels, memory, numbers(0, 1, 2, 3)) == (
        4,
        record(PAGE, 0, ONES, NAME)
        + record(ZERO, 0x1000, b"\0")
        + record(PAGE, 0x2000, TWOS)
        + record(ZERO, 0x3000, b"\0"),
        2,
    )


@both
def test_only_the_pages_asked_for_are_packed(kernels):
    memory = memory_of(ONES, ZEROS, TWOS, ZEROS)
    wire = record(ZERO, 0x1000, b"\0", NAME) + record(PAGE, 0x2000, TWOS)
    assert packed(kernels, memory, numbers(1, 2)) == (2, wire, 1)
    assert packed(kernels, memory, numbers()) == (0, b"", 0)


@both
def test_every_record_continues_where_the_name_was_sent_before(kernels):
    wire = record(PAGE, 0, ONES) + record(ZERO, 0x1000, b"\0")
    assert packed(kernels, memory_of(ONES, ZEROS), numbers(0, 1), named=False) == (2, wire, 1)


@both
@pytest.mark.parametrize("at", [0, 7, 8, 63, 64, 2048, 4032, 4088, 4095])
def test_one_byte_makes_a_page_that_is_not_zero(kernels, at):
    page = bytearray(4096)
    page[at] = 0x80
    found = packed(kernels, memory_of(ONES, page, ONES), numbers(1), named=False)
    assert found == (1, record(PAGE, 0x1000, page), 0)


@both
@pytest.mark.parametrize("room", [0, 14, 15, 16, 24, 25, 4110, 4111, 8214, 8215])
def test_packing_goes_on_where_the_room_ended(kernels, room):
    memory, pages = memory_of(ZEROS, ONES, TWOS), numbers(0, 1, 2)
    whole = packed(kernels, memory, pages)[1]
    first, wire = 0, b""
    for size in (room, 1 << 20):
        out = bytearray(size)
        first, used, _ = kernels.pack_pages(memory, pages, first, 4096, NAME, not wire, out)
        wire += out[:used]
        assert not any(out[used:]), "nothing is written behind what was said to be"
    assert (first, wire) == (3, whole)


@both
def test_room_that_is_just_enough_is_used(kernels):
    memory, pages = memory_of(ONES, ZEROS), numbers(0, 1)
    assert packed(kernels, memory, pages[:1], room=4111)[0] == 1
    assert packed(kernels, memory, pages[1:], room=16)[0] == 1
    assert packed(kernels, memory, pages, named=False, room=4113)[0] == 2


@both
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_of_every_size_are_packed(kernels, page_size):
    memory = memory_of(bytes(page_size), b"\5" * page_size)
    out = bytearray(2 * page_size)
    _, used, zeros = kernels.pack_pages(memory, numbers(0, 1), 0, page_size, NAME, True, out)
    wire = record(ZERO, 0, b"\0", NAME) + record(PAGE, page_size, b"\5" * page_size)
    assert (out[:used], zeros) == (wire, 1)


@both
def test_what_was_never_touched_is_not_looked_at(kernels):
    with mapped(PAGES) as (memory, taken):
        memory[5 * 4096] = 1
        known = np.zeros(PAGES, np.uint8)
        known[5] = 1
        before = taken()
        wire, zeros = packed(kernels, memory, numbers(*range(PAGES)), known=known)[1:]
        assert (zeros, len(wire)) == (PAGES - 1, (PAGES - 1) * 9 + 4104 + len(NAME))
        mask = np.zeros(PAGES, np.uint8)
        pages = numbers(*range(PAGES))
        assert kernels.zero_pages(memory, pages, 4096, mask, known) == PAGES - 1
        assert mask.tolist() == [page != 5 for page in range(PAGES)]
        assert taken() == before


@both
@pytest.mark.parametrize("page", [2, 1 << 52, (1 << 64) - 1])
def test_page_outside_the_memory_is_refused(kernels, page):
    memory, pages = memory_of(ONES, ONES, ONES[:-1]), numbers(0, page)
    with pytest.raises(ValueError, match="outside"):
        packed(kernels, memory, pages)
    with pytest.raises(ValueError, match="outside"):
        kernels.zero_pages(memory, pages, 4096, np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="outside"):
        kernels.gather_pages(memory, pages, 4096, bytearray(8192))


@both
def test_what_does_not_fit_is_refused(kernels):
    memory, pages, room = memory_of(ONES, ONES), numbers(0, 1), bytearray(100)
    with pytest.raises(ValueError, match="known"):
        packed(kernels, memory, pages, known=b"\1")
    with pytest.raises(ValueError, match="before the first"):
        kernels.pack_pages(memory, pages, -1, 4096, NAME, True, room)
    with pytest.raises(ValueError, match="a name"):
        kernels.pack_pages(memory, pages, 0, 4096, b"", True, room)
    for size in (0, 512, 4097, 12288):
        with pytest.raises(ValueError, match="page size"):
            kernels.pack_pages(memory, pages, 0, size, NAME, True, room)


@both
def test_mask_says_which_pages_are_zero(kernels):
    memory, mask = memory_of(ONES, ZEROS, TWOS, ZEROS), np.full(5, 7, np.uint8)
    assert kernels.zero_pages(memory, numbers(0, 1, 3), 4096, mask) == 2
    assert mask.tolist() == [0, 1, 1, 7, 7]
    with pytest.raises(ValueError, match="too short"):
        kernels.zero_pages(memory, numbers(0, 1, 3), 4096, np.zeros(2, np.uint8))


@both
def test_pages_are_copied_one_behind_the_other(kernels):
    memory, out = memory_of(ONES, ZEROS, TWOS), bytearray(b"\7" * 8200)
    assert kernels.gather_pages(memory, numbers(2, 0), 4096, out) == 8192
    assert out == TWOS + ONES + b"\7" * 8
    assert kernels.gather_pages(memory, numbers(), 4096, bytearray()) == 0
    with pytest.raises(ValueError, match="room"):
        kernels.gather_pages(memory, numbers(0, 1), 4096, bytearray(8191))


contents = st.sampled_from((b"\1" * 1024, bytes(1023) + b"\2", bytes(1024), bytes(1024)))
blocks = st.lists(contents, min_size=1, max_size=8)


@needs_compiled
@given(blocks, st.data())
def test_twins_pack_alike(content, data):
    memory = memory_of(*content)
    index = st.integers(0, len(content) + (data.draw(st.integers(0, 9)) == 0))
    pages = np.array(data.draw(st.lists(index, max_size=8)), np.uint64)
    known = data.draw(st.sampled_from((b"", bytes(len(content)), b"\1" * len(content))))
    first, named = data.draw(st.integers(0, 9)), data.draw(st.booleans())
    room = data.draw(st.integers(0, 8300))
    results = []
    for kernels in (compiled, plain):
        out, mask, rest = bytearray(room), np.zeros(8, np.uint8), bytearray(8192)
        try:
            done = kernels.pack_pages(memory, pages, first, 1024, NAME, named, out, known)
            count = kernels.zero_pages(memory, pages, 1024, mask, known)
            gathered = kernels.gather_pages(memory, pages, 1024, rest)
            results.append((done, out, count, mask.tolist(), gathered, rest))
        except ValueError as error:
            results.append(str(error))
    assert results[0] == results[1]
