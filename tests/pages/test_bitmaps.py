from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.twins import both

WORDS = 4
PAGES = 64 * WORDS
sets = st.one_of(
    st.frozensets(st.integers(0, PAGES - 1)),
    st.sampled_from((frozenset(), frozenset(range(PAGES)), frozenset(range(63, 129)))),
)
numbers = st.one_of(st.integers(0, PAGES), st.sampled_from((0, 1, 63, 64, 65, PAGES - 1, PAGES)))


def bitmap_of(pages):
    return np.array(
        [sum(1 << bit for bit in range(64) if 64 * word + bit in pages) for word in range(WORDS)],
        np.uint64,
    )


@both
@given(sets)
def test_pages_are_counted(kernels, pages):
    assert kernels.count_pages(bitmap_of(pages)) == len(pages)
    assert kernels.count_pages(np.zeros(0, np.uint64)) == 0


@both
@given(sets, numbers, numbers)
def test_range_is_added(kernels, pages, first, count):
    count = min(count, PAGES - first)
    bitmap = bitmap_of(pages)
    kernels.set_range(bitmap, first, count)
    assert bitmap.tolist() == bitmap_of(pages | set(range(first, first + count))).tolist()


@both
@pytest.mark.parametrize(
    ("first", "count"), [(-1, 1), (0, -1), (0, PAGES + 1), (PAGES, 1), (PAGES + 1, 0), (1, PAGES)]
)
def test_range_outside_the_bitmap_is_refused(kernels, first, count):
    bitmap = bitmap_of(())
    with pytest.raises(ValueError, match="set_range"):
        kernels.set_range(bitmap, first, count)
    assert not bitmap.any()


@both
@given(sets, numbers, numbers)
def test_pages_are_taken_in_order_and_are_gone(kernels, pages, first, limit):
    bitmap, out = bitmap_of(pages), np.full(PAGES, 7, np.uint64)
    following, count = kernels.take_pages(bitmap, first, limit, out)
    taken = sorted(page for page in pages if page >= first)[:limit]
    assert out[:count].tolist() == taken
    assert (out[count:] == 7).all(), "what was not taken is not written"
    assert bitmap.tolist() == bitmap_of(pages - set(taken)).tolist()
    if count < limit:
        assert following == PAGES
    else:
        assert following == (taken[-1] + 1 if taken else first)


@both
@given(sets, st.integers(1, 50))
def test_taking_again_and_again_gives_every_page_once(kernels, pages, limit):
    bitmap, out, found, at = bitmap_of(pages), np.zeros(limit, np.uint64), [], 0
    while at < PAGES:
        at, count = kernels.take_pages(bitmap, at, limit, out)
        found += out[:count].tolist()
    assert found == sorted(pages)
    assert not bitmap.any()


@both
def test_taking_behind_the_bitmap_gives_nothing(kernels):
    bitmap, out = bitmap_of(range(PAGES)), np.zeros(4, np.uint64)
    assert kernels.take_pages(bitmap, PAGES, 4, out) == (PAGES, 0)
    assert kernels.take_pages(bitmap, PAGES + 100, 4, out) == (PAGES + 100, 0)
    assert kernels.count_pages(bitmap) == PAGES


@both
@pytest.mark.parametrize(("first", "limit"), [(-1, 1), (0, -1), (0, 5)])
def test_taking_more_than_fits_or_from_before_the_first_is_refused(kernels, first, limit):
    bitmap = bitmap_of(range(PAGES))
    with pytest.raises(ValueError, match="take_pages"):
        kernels.take_pages(bitmap, first, limit, np.zeros(4, np.uint64))
    assert kernels.count_pages(bitmap) == PAGES
