"""How long who waits for memory has waited."""

from __future__ import annotations

import numpy as np
import pytest

from vmferry.migration.postcopy.waits import Waits


class Clocked:
    """Waits of the threads 7 and 8, by a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.times = np.zeros(3)
        self.waits = Waits([7, 8], self.times, clock=lambda: self.now)


@pytest.fixture
def clocked() -> Clocked:
    return Clocked()


def test_each_waits_for_itself_and_all_wait_together(clocked: Clocked) -> None:
    clocked.waits.begin(7, 1)
    clocked.now += 1
    clocked.waits.begin(8, 2)
    clocked.now += 2
    clocked.waits.end(2)
    clocked.now += 4
    clocked.waits.end(1)
    assert clocked.times.tolist() == [7.0, 2.0, 2.0]


def test_both_may_wait_for_the_same_page(clocked: Clocked) -> None:
    clocked.waits.begin(7, 5)
    clocked.waits.begin(8, 5)
    clocked.now += 3
    clocked.waits.end(6)
    clocked.waits.end(5)
    clocked.now += 3
    clocked.waits.end(5)
    assert clocked.times.tolist() == [3.0, 3.0, 3.0]


def test_others_are_not_counted(clocked: Clocked) -> None:
    clocked.waits.begin(7, 1)
    clocked.waits.begin(9, 1)
    clocked.now += 1
    clocked.waits.end_all()
    clocked.waits.end_all()
    assert clocked.times.tolist() == [1.0, 0.0, 0.0]


def test_without_threads_nobody_waits() -> None:
    times = np.zeros(1)
    waits = Waits([], times)
    waits.begin(0, 1)
    waits.end(1)
    waits.end_all()
    assert times.tolist() == [0.0]
