from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.twins import both, compiled, needs_compiled, plain
from tests.pages.xbzrle import encode, uleb

ZEROS = bytes(4096)
RAMP = bytes(range(256)) * 16


def patched(page, **changes):
    page = bytearray(page)
    for at, content in changes.items():
        position = int(at[1:])
        page[position : position + len(content)] = content
    return bytes(page)


LONG_OLD = patched(ZEROS, _1001=bytes.fromhex("05060708090a0b0c0d0e0f101112136800006b006d"))
LONG_NEW = patched(ZEROS, _1001=bytes.fromhex("0102030405060708090a0b0c0d0e0f680000670069"))

# Name, old page, new page, encoding: checked against QEMU 7.2.
VECTORS = [
    ("one byte at the start", ZEROS, patched(ZEROS, _0=b"\x90"), "00 01 90"),
    (
        "three runs, two of them with lengths of two bytes",
        RAMP,
        patched(RAMP, _100=b"\xaa\xbb\xcc", _300=b"\xd3", _4095=b"\x7e"),
        "64 03 aa bb cc c5 01 01 d3 d2 1d 01 7e",
    ),
    ("equal bytes at the end left out", RAMP, patched(RAMP, _4090=b"\xfb"), "fa 1f 01 fb"),
    (
        "short runs after a long one",
        LONG_OLD,
        LONG_NEW,
        "e9 07 0f 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 03 01 67 01 01 69",
    ),
    ("nothing changed", RAMP, RAMP, ""),
]


def encoded(kernels, old, new, room=None):
    """``None`` where it does not fit."""
    out = bytearray(b"\7" * (len(new) + 64 if room is None else room))
    size = kernels.xbzrle_encode(old, new, out)
    assert out[max(size, len(new)) :] == b"\7" * (len(out) - max(size, len(new)))
    return None if size < 0 else bytes(out[:size])


@both
@pytest.mark.parametrize(("name", "old", "new", "wire"), VECTORS, ids=[v[0] for v in VECTORS])
def test_known_vector_decodes(kernels, name, old, new, wire):
    page = bytearray(old)
    assert kernels.xbzrle_decode(bytes.fromhex(wire), page)
    assert page == new


@both
@pytest.mark.parametrize(("name", "old", "new", "wire"), VECTORS, ids=[v[0] for v in VECTORS])
def test_known_vector_is_what_is_encoded(kernels, name, old, new, wire):
    assert encoded(kernels, old, new) == bytes.fromhex(wire)


@pytest.mark.parametrize(("name", "old", "new", "wire"), VECTORS, ids=[v[0] for v in VECTORS])
def test_encoder_of_the_tests_gives_the_known_vectors(name, old, new, wire):
    assert encode(old, new) == bytes.fromhex(wire)


# What breaks a rule, encoded, the rule.
BROKEN = [
    ("a lone byte where a pair of runs starts", "05"),
    ("a lone byte after a pair", "0001aa 05"),
    ("a second unchanged run of 0", "0001aa 0001bb"),
    ("a changed run of 0", "0500"),
    ("a changed run of 0 in two bytes", "058000"),
    ("an unchanged run past the page", "8120 01 aa"),
    ("an unchanged run past the rest of the page", "ff1f01aa 0101bb"),
    ("an unchanged run to the very end, nothing behind it", "8020"),
    ("an unchanged run to the very end, and a byte behind it", "8020 01 aa"),
    ("a changed run past the page", "ff1f 02 aabb"),
    ("a changed run longer than the input", "00 03 aabb"),
    ("a run length of three bytes", "808001 01 aa"),
    ("a changed run's length of three bytes", "00 818001 aa"),
    ("a run length cut in two", "00 80"),
    ("an unchanged run at the end", "0001aa 01"),
    ("an unchanged run of two bytes at the end", "0001aa 8101"),
]


@both
@pytest.mark.parametrize(("rule", "wire"), BROKEN, ids=[b[0] for b in BROKEN])
def test_broken_encoding_is_refused(kernels, rule, wire):
    assert not kernels.xbzrle_decode(bytes.fromhex(wire), bytearray(ZEROS))


@both
def test_first_unchanged_run_may_be_0_in_two_bytes(kernels):
    page = bytearray(ZEROS)
    assert kernels.xbzrle_decode(bytes.fromhex("8000 01 aa"), page)
    assert page[0] == 0xAA


@both
def test_changed_run_may_fill_the_page(kernels):
    page = bytearray(64)
    assert kernels.xbzrle_decode(b"\x00\x40" + bytes(range(64)), page)
    assert page == bytes(range(64))


@both
def test_encoder_gives_up_on_a_page_that_changed_everywhere(kernels):
    assert encoded(kernels, ZEROS, b"\xff" * 4096) is None
    assert encoded(kernels, ZEROS, b"\xff\0" * 2048) is None
    assert encoded(kernels, ZEROS, b"\xff\xff\xff\0" * 1024) is None
    assert len(encoded(kernels, ZEROS, b"\xff\0\0\0" * 1024)) == 3072
    assert encoded(kernels, bytes(16384), b"\xff" * 16384) is None


# A page of 64 bytes as unchanged and changed bytes in turn, and how long it gets.
TIGHT = [
    ("a run that fills the room", [0, 62, 2], None),
    ("a run that leaves one byte", [0, 61, 3], None),
    ("a run that leaves two bytes", [0, 60, 4], 62),
    ("a run that fills the room at the end of the page", [2, 62], 64),
    ("a run that leaves one byte at the end of the page", [3, 61], 63),
    ("a run that does not fit at the end of the page", [1, 63], None),
    ("room for the unchanged run alone", [0, 20, 1, 38, 1, 1, 3], None),
    ("room for all of the next but its bytes", [0, 20, 1, 37, 1, 2, 3], None),
    ("room for the last run alone", [0, 20, 1, 37, 1, 1, 4], None),
    ("room for the last run and one more", [0, 20, 1, 36, 1, 1, 5], None),
    ("room for the last run and two more", [0, 20, 1, 34, 1, 1, 7], 61),
    ("no room for the last run, at the end of the page", [0, 20, 1, 38, 4, 1], None),
    ("just room for the last run, at the end of the page", [0, 20, 1, 37, 5, 1], 64),
]


@both
@pytest.mark.parametrize(("what", "runs", "size"), TIGHT, ids=[t[0] for t in TIGHT])
def test_room_is_that_of_a_page(kernels, what, runs, size):
    assert sum(runs) == 64
    page = b"".join(bytes([number % 2]) * length for number, length in enumerate(runs))
    for wire in (encoded(kernels, bytes(64), page), encode(bytes(64), page)):
        assert (None if wire is None else len(wire)) == size


@both
def test_nothing_is_written_where_the_length_of_an_unchanged_run_fills_the_room(kernels):
    start = b"\1\0" * 339 + b"\1\1\1"
    assert len(encode(bytes(4096), start.ljust(4096, b"\0"))) == 1022
    assert encoded(kernels, bytes(1024), start + bytes(200) + b"\1" * 143) is None


@both
def test_nothing_is_read_behind_the_page(kernels):
    """It would not return: what follows is no memory of this process."""
    area = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    behind = np.frombuffer(area, np.uint8)[mmap.PAGESIZE :].ctypes.data
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), mmap.PAGESIZE, 0) == 0
    page = memoryview(area)[mmap.PAGESIZE - 64 : mmap.PAGESIZE]
    page[60:] = b"abcd"
    assert encoded(kernels, bytes(64), page) == b"\x3c\4abcd"
    assert kernels.xbzrle_decode(b"\x3c\4efgh", page)
    assert page[60:] == b"efgh"


@both
@pytest.mark.parametrize("room", range(12))
def test_out_of_less_than_a_page_is_the_room(kernels, room):
    new = patched(ZEROS, _3=b"abc", _8=b"d")
    wire = bytes.fromhex("03 03 61 62 63 02 01 64")
    # Behind the last run there must be room for the start of another.
    assert encoded(kernels, ZEROS, new, room) == (wire if room >= 10 else None)
    assert encoded(kernels, ZEROS, ZEROS, room) == (b"" if room >= 2 else None)


@both
@pytest.mark.parametrize(("old", "new"), [(64, 128), (0, 0), (100, 100), (16448, 16448)])
def test_pages_that_cannot_be_encoded_are_refused(kernels, old, new):
    with pytest.raises(ValueError, match="xbzrle_encode"):
        kernels.xbzrle_encode(bytes(old), bytes(new), bytearray(20000))


@both
def test_page_without_bytes_takes_none(kernels):
    assert kernels.xbzrle_decode(b"", bytearray())
    assert not kernels.xbzrle_decode(b"\0\1a", bytearray())


sizes = st.sampled_from((64, 1024, 4096, 16384))
sparse = st.dictionaries(st.integers(0, 16383), st.integers(0, 255), max_size=40)
runs = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), max_size=60)


@st.composite
def page_pairs(draw):
    """A page before and after: bytes here and there, and runs from 1 byte to beyond a word."""
    size = draw(sizes)
    before, after = bytearray(size), bytearray(size)
    for page, changes in ((before, draw(sparse)), (after, draw(sparse))):
        for at, value in changes.items():
            page[at % size] = value
    at = 0
    for same, changed in draw(runs):
        at += same
        for place in range(min(at, size), min(at + changed, size)):
            after[place] = before[place] ^ 0x81
        at += changed
    return bytes(before), bytes(after)


@both
@given(page_pairs())
def test_encoding_is_that_of_qemu_and_decodes(kernels, pair):
    before, after = pair
    wire = encoded(kernels, before, after)
    assert wire == encode(before, after)
    page = bytearray(before)
    assert wire is None or (kernels.xbzrle_decode(wire, page) and page == after)


lengths = st.integers(0, 300).map(uleb)
tokens = st.one_of(lengths, st.binary(max_size=6), st.just(b"\x80"), st.just(b"\xff\x1f"))


@needs_compiled
@given(st.lists(tokens, max_size=12).map(b"".join), st.sampled_from((32, 300, 4096)))
def test_twins_agree_on_any_input(encoded, size):
    pages = bytearray(size), bytearray(size)
    done = [k.xbzrle_decode(encoded, p) for k, p in zip((compiled, plain), pages, strict=True)]
    assert done[0] == done[1]
    assert pages[0] == pages[1]


@both
def test_nothing_beyond_the_page_is_touched(kernels):
    memory = bytearray(96)
    assert not kernels.xbzrle_decode(b"\x1f\x02\xaa\xbb", memoryview(memory)[32:64])
    assert memory == bytes(96)
