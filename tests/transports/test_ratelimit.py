"""The rate limit under a clock of our own: what passes in any second, and what a change does."""

from __future__ import annotations

import bisect
import itertools
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transports.support import PROMPT, background, blocked, receive
from vmferry.errors import ChannelClosed, UsageError
from vmferry.transports import RateLimit, limited, memory_pair

PLENTY = 1 << 40
RATES = st.floats(1, 2e10)


class FakeClock:
    """Time passes only while somebody waits, and *late* seconds more than was asked for."""

    def __init__(self, late: float = 0.0) -> None:
        self.time = 1000.0
        self.late = late

    def now(self) -> float:
        return self.time

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        assert changed
        # A clock has a resolution; without one a wait can be too short to move it.
        self.time += max(seconds, 1e-6) + self.late


def busiest_second(log: list[tuple[float, int]]) -> int:
    """The most bytes that went in any second of *log*, which has (time, bytes)."""
    times = [time for time, _ in log]
    sums = [0, *itertools.accumulate(count for _, count in log)]
    return max(sums[bisect.bisect_left(times, time + 1)] - sums[i] for i, time in enumerate(times))


def sent_log(limit: RateLimit, clock: FakeClock, seconds: float) -> list[tuple[float, int]]:
    """What a channel that always has more to send would send, portion by portion."""
    log = []
    end = clock.time + seconds
    while clock.time < end:
        portion = limit.take_some(PLENTY)
        log.append((clock.time, portion))
    return log


@given(RATES)
@settings(max_examples=30, deadline=None)
def test_rate_holds_within_five_percent(rate: float) -> None:
    clock = FakeClock()
    log = sent_log(RateLimit(rate, clock=clock), clock, 2)
    total = sum(count for _, count in log[:-1])
    seconds = log[-1][0] - log[0][0]
    # A portion is a whole number of bytes, and the slowest rates have few of them.
    assert total == pytest.approx(rate * seconds, rel=0.05, abs=1)
    assert busiest_second(log) <= 1.05 * rate + 1


@given(st.floats(1e5, 2e10), st.floats(0, 0.03))
@settings(max_examples=30, deadline=None)
def test_late_wake_ups_do_not_lower_the_rate(rate: float, late: float) -> None:
    clock = FakeClock(late)
    log = sent_log(RateLimit(rate, clock=clock), clock, 2)
    total = sum(count for _, count in log)
    assert total == pytest.approx(rate * 2, rel=0.05)
    assert busiest_second(log) <= 1.05 * rate + 1


@settings(deadline=None)
@given(st.floats(1e3, 1e11), st.floats(0, 1e6))
def test_start_and_idle_time_allow_no_burst(rate: float, idle: float) -> None:
    clock = FakeClock()
    limit = RateLimit(rate, clock=clock)
    clock.time += idle
    start = clock.time
    taken = last = 0
    while clock.time == start:
        taken += last
        last = limit.take_some(PLENTY)
    assert taken <= 0.05 * rate + 1


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.one_of(st.none(), RATES), st.integers(1, 1 << 24)), max_size=20),
    st.floats(1e6, 1e9),
)
def test_no_change_of_rate_leaves_a_debt_behind(
    changes: list[tuple[float | None, int]], rate: float
) -> None:
    clock = FakeClock()
    limit = RateLimit(clock=clock)
    for changed, nbytes in changes:
        limit.rate = changed
        limit.take_some(nbytes)
    limit.rate = rate
    assert limit.rate == rate
    start = clock.time
    limit.take(int(rate))
    assert 0.94 <= clock.time - start <= 2.0  # the slowest rate of all owes a second for its byte


@given(RATES)
@settings(max_examples=30, deadline=None)
def test_who_waits_elsewhere_keeps_the_rate_too(rate: float) -> None:
    clock = FakeClock()
    limit = RateLimit(rate, clock=clock)
    portion = max(int(rate / 100), 1)
    sent, start = 0, clock.time
    while clock.time < start + 2:
        clock.time += limit.due()
        limit.spend(portion)
        sent += portion
    assert sent - portion <= 1.05 * rate * (clock.time - start) + portion


def test_no_rate_is_no_limit() -> None:
    clock = FakeClock()
    limit = RateLimit(clock=clock)
    assert limit.rate is None
    limit.take(1 << 40)
    assert clock.time == 1000.0


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_senseless_rate_is_a_usage_error(rate: float) -> None:
    with pytest.raises(UsageError, match="rate above 0"):
        RateLimit(rate)
    limit = RateLimit(5)
    with pytest.raises(UsageError, match="rate above 0"):
        limit.rate = rate
    assert limit.rate == 5


def test_lower_rate_is_heeded_within_a_send() -> None:
    clock = FakeClock()
    limit = RateLimit(1e8, clock=clock)
    sender, receiver = memory_pair(capacity=1 << 16)
    sending = background(lambda: limited(sender, limit).send([bytes(3 << 20)]))
    receive(receiver, 1 << 20)
    limit.rate = 1e6
    start = clock.time
    receive(receiver, 2 << 20)
    sending.result(PROMPT)
    assert clock.time - start > 1  # the portion on its way is still a big one


def test_two_channels_share_one_rate() -> None:
    clock = FakeClock()
    limit = RateLimit(1e6, clock=clock)
    for _ in range(2):
        sender, receiver = memory_pair(capacity=1 << 20)
        limited(sender, limit).send([bytes(500_000), bytes(100_000)])
        assert len(receive(receiver, 600_000)) == 600_000
    assert clock.time - 1000.0 == pytest.approx(1.2, abs=0.06)


def test_threads_share_one_rate() -> None:
    clock = FakeClock()
    limit = RateLimit(1e6, clock=clock)
    takers = [background(lambda: limit.take(300_000)) for _ in range(4)]
    for taker in takers:
        taker.result(PROMPT)
    assert clock.time - 1000.0 == pytest.approx(1.2, abs=0.06)


def test_limited_channel_sends_in_portions() -> None:
    sender, receiver = memory_pair(capacity=1 << 20)
    clock = FakeClock()
    limited(sender, RateLimit(1e6, clock=clock)).send([b"a" * 7000, b"", b"b" * 7000])
    assert receive(receiver, 14000) == b"a" * 7000 + b"b" * 7000
    assert clock.time - 1000.0 == pytest.approx(0.01, abs=0.001)  # the third portion's time


def test_waiting_take_is_released_by_a_shutdown() -> None:
    limit = RateLimit(1)
    waiting = blocked(lambda: limit.take(1000))
    limit.shutdown()
    with pytest.raises(ChannelClosed):
        waiting.result(PROMPT)
    with pytest.raises(ChannelClosed):
        limit.take(1)


@pytest.mark.parametrize("rate", [None, 1e12])
def test_waiting_take_is_released_by_a_higher_rate(rate: float | None) -> None:
    limit = RateLimit(1)
    waiting = blocked(lambda: limit.take(1000))
    limit.rate = rate
    waiting.result(PROMPT)


def test_shutdown_of_a_limited_channel_releases_its_sender() -> None:
    channel = limited(memory_pair(capacity=1 << 20)[0], RateLimit(10_000))
    sending = blocked(lambda: channel.send([bytes(1 << 20)]))
    channel.shutdown()
    with pytest.raises(ChannelClosed):
        sending.result(PROMPT)
