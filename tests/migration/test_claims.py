"""Pages are stored by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest

from tests.migration.script import BLOCKS, PAGE_SIZE, RAM, ROM
from tests.transports.support import PROMPT, background, blocked
from vmferry.migration.claims import PageClaims


@pytest.fixture
def claims() -> PageClaims:
    made = PageClaims()
    made.announce(BLOCKS.blocks, PAGE_SIZE)
    return made


def held(claims: PageClaims, *pages: int, block: str = RAM.name) -> AbstractContextManager[None]:
    return claims.held(block, [np.array(pages, np.uint64)])


def hold(claims: PageClaims, *pages: int, block: str = RAM.name) -> None:
    with held(claims, *pages, block=block):
        pass


@pytest.mark.parametrize("pages", [(3,), (0, 3), (3, 63), (1, 2, 3)])
def test_page_that_is_being_stored_is_waited_for(claims: PageClaims, pages: Sequence[int]) -> None:
    with held(claims, 1, 2, 3):
        other = blocked(lambda: hold(claims, *pages))
        assert not other.done()
    other.result(PROMPT)


def test_other_pages_are_stored_at_the_same_time(claims: PageClaims) -> None:
    with claims.held(RAM.name, [slice(1, 2), slice(3, 4)]):
        background(lambda: hold(claims, 0, 2, 4)).result(PROMPT)
        background(lambda: hold(claims, 1, 3, block=ROM.name)).result(PROMPT)


def test_page_may_stand_twice_in_a_batch(claims: PageClaims) -> None:
    for _ in range(2):
        hold(claims, 5, 5)


def test_pages_are_free_again_after_a_failure(claims: PageClaims) -> None:
    with pytest.raises(ZeroDivisionError), held(claims, 1):
        raise ZeroDivisionError
    hold(claims, 1)


def test_no_two_of_many_threads_store_the_same_page(claims: PageClaims) -> None:
    busy: set[int] = set()
    lock = threading.Lock()
    random = np.random.default_rng(1)
    plans = [[random.choice(64, 8, replace=False).tolist() for _ in range(100)] for _ in range(6)]

    def work(plan: list[list[int]]) -> None:
        for pages in plan:
            with held(claims, *pages):
                with lock:
                    assert not busy & set(pages)
                    busy.update(pages)
                with lock:
                    busy.difference_update(pages)

    for future in [background(lambda plan=plan: work(plan)) for plan in plans]:
        future.result(PROMPT)
