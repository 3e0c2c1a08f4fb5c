from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tests.pages.twins import PAGE_SIZES, both

pages = st.one_of(
    st.just(bytes(1024)),
    st.binary(min_size=1, max_size=32).map(lambda piece: (piece * 1024)[:1024]),
    st.integers(0, 1023).map(lambda at: bytes(at) + b"\1" + bytes(1023 - at)),
)


def sums_of(kernels, data, page_size):
    sums = np.full(len(data) // page_size + 1, 7, np.uint64)
    kernels.page_sums(data, page_size, sums)
    assert sums[-1] == 7, "only the sums of whole pages are written"
    return sums[:-1].tolist()


def expected(page):
    return xxhash.xxh64_intdigest(page) if any(page) else 0


@both
@given(st.lists(pages, max_size=5))
def test_sum_is_xxh64_and_0_for_zero_pages(kernels, content):
    assert sums_of(kernels, b"".join(content), 1024) == [expected(page) for page in content]


@both
@pytest.mark.parametrize("page_size", [32, 64, 96, *PAGE_SIZES, 1 << 20])
def test_sum_holds_for_pages_of_every_size(kernels, page_size):
    page = bytes(range(251)) * (page_size // 251) + b"\2" * (page_size % 251)
    data = page + bytes(page_size) + page[::-1]
    assert sums_of(kernels, data, page_size) == [expected(page), 0, expected(page[::-1])]


@both
def test_rest_of_less_than_a_page_is_left_out(kernels):
    assert sums_of(kernels, b"\1" * 1024 + b"\2" * 1023, 1024) == [expected(b"\1" * 1024)]


@both
def test_no_page_has_no_sum(kernels):
    assert sums_of(kernels, b"", 4096) == []


@both
@pytest.mark.parametrize("page_size", [0, 1, 16, 33, -4096])
def test_page_size_that_is_no_multiple_of_32_is_refused(kernels, page_size):
    with pytest.raises(ValueError, match="page size"):
        kernels.page_sums(bytes(4096), page_size, np.zeros(4096, np.uint64))


@both
def test_too_few_sums_are_refused(kernels):
    with pytest.raises(ValueError, match="too short"):
        kernels.page_sums(bytes(8192), 4096, np.zeros(1, np.uint64))
