from __future__ import annotations

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


@both
@pytest.mark.parametrize(("name", "old", "new", "wire"), VECTORS, ids=[v[0] for v in VECTORS])
def test_known_vector_decodes(kernels, name, old, new, wire):
    page = bytearray(old)
    assert kernels.xbzrle_decode(bytes.fromhex(wire), page)
    assert page == new


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


def test_encoder_gives_up_on_a_page_that_changed_everywhere():
    assert encode(ZEROS, b"\xff" * 4096) is None
    assert encode(ZEROS, b"\xff\0" * 2048) is None
    every_fourth = encode(ZEROS, b"\xff\0\0\0" * 1024)
    assert every_fourth is not None
    assert len(every_fourth) == 3072


sizes = st.sampled_from((64, 1024, 4096, 16383))
sparse = st.dictionaries(st.integers(0, 16382), st.integers(0, 255), max_size=40)


@both
@given(sizes, sparse, sparse)
def test_what_was_encoded_decodes(kernels, size, old, new):
    before, after = bytearray(size), bytearray(size)
    for page, changes in ((before, old), (after, new)):
        for at, value in changes.items():
            page[at % size] = value
    encoded = encode(bytes(before), bytes(after))
    assert encoded is None or (kernels.xbzrle_decode(encoded, before) and before == after)


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
