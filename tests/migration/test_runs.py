"""Runs of pages."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.migration.runs import page_runs


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ([], []),
        ([7], [(7, 8)]),
        ([3, 4, 5], [(3, 6)]),
        ([3, 4, 9], [(3, 5), (9, 10)]),
        ([5, 5, 6, 2], [(5, 6), (5, 7), (2, 3)]),
    ],
)
def test_runs_of_pages(pages: list[int], runs: list[tuple[int, int]]) -> None:
    assert page_runs(np.array(pages, np.uint64)) == runs


@given(st.lists(st.integers(0, 20)))
def test_runs_have_the_pages_in_their_order(pages: list[int]) -> None:
    runs = page_runs(np.array(pages, np.uint64))
    assert [page for first, last in runs for page in range(first, last)] == pages
    assert all(a[1] != b[0] for a, b in itertools.pairwise(runs))
