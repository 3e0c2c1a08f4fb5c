"""No channel gets ahead of a synchronisation, and neither does the main channel."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.transports.support import PROMPT, background, blocked
from vmferry.errors import PeerError, StreamError, TransportError
from vmferry.migration.barrier import SyncBarrier

MAIN = -1


def joined(*channels: int) -> SyncBarrier:
    barrier = SyncBarrier()
    for channel in channels:
        barrier.expect()
        assert barrier.join(channel)
    return barrier


class Turnstile:
    """Lets threads go on in a given order, those left out that wait in the barrier."""

    def __init__(self, order: tuple[int, ...]) -> None:
        self._order = list(order)
        self._waiting: set[int] = set()
        self._changed = threading.Condition()

    def arrive(self, who: int, wait: Callable[[], object]) -> None:
        """Call *wait* when it is the turn of *who*."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._next() == who, PROMPT)
            self._order.remove(who)
            self._waiting.add(who)
            self._changed.notify_all()
        wait()
        with self._changed:
            self._waiting.discard(who)
            self._changed.notify_all()

    def _next(self) -> int | None:
        return next((who for who in self._order if who not in self._waiting), None)


def interleavings(left: dict[int, int]) -> Iterator[tuple[int, ...]]:
    """Every order of so many arrivals each."""
    if not any(left.values()):
        yield ()
    for who, count in left.items():
        if count:
            for rest in interleavings(left | {who: count - 1}):
                yield who, *rest


def arrive_in(order: tuple[int, ...], channels: int, rounds: int) -> SyncBarrier:
    """Let the main channel and all others arrive in that order, and check who passes when."""
    barrier = joined(*range(channels))
    turnstile = Turnstile(order)
    arrived = dict.fromkeys((MAIN, *range(channels)), 0)

    def synchronise(who: int) -> None:
        arrived[who] += 1
        mine = arrived[who]
        if who == MAIN:
            barrier.main(PROMPT)
        else:
            assert barrier.deliver(who)
        assert min(arrived.values()) >= mine, f"{who} passed its synchronisation {mine} alone"

    def run(who: int) -> None:
        for _ in range(rounds):
            turnstile.arrive(who, lambda: synchronise(who))

    for future in [background(functools.partial(run, who)) for who in arrived]:
        future.result(PROMPT)
    return barrier


@pytest.mark.parametrize(("channels", "rounds"), [(1, 3), (2, 2), (3, 1)])
def test_nobody_gets_ahead_in_any_order_of_arrivals(channels: int, rounds: int) -> None:
    for order in interleavings(dict.fromkeys((MAIN, *range(channels)), rounds)):
        barrier = arrive_in(order, channels, rounds)
        assert barrier.released == rounds
        barrier.finish()


def test_main_channel_waits_for_a_connection_that_has_not_said_its_number() -> None:
    barrier = joined(0)
    barrier.expect()
    first = background(lambda: barrier.deliver(0))
    main = blocked(lambda: barrier.main(PROMPT))
    barrier.join(1)
    second = background(lambda: barrier.deliver(1))
    for each in (main, first, second):
        each.result(PROMPT)


def test_number_is_taken_once() -> None:
    assert not joined(3).join(3)


def test_wait_for_a_channel_that_never_delivers_ends_with_its_name() -> None:
    barrier = joined(0, 7)
    barrier.expect()
    delivering = background(lambda: barrier.deliver(0))
    with pytest.raises(
        TransportError,
        match=r"waited 0.05 s for synchronisation 1 of multifd channel 7 and 1 connection\(s\)",
    ):
        barrier.main(0.05)
    barrier.break_off()
    assert delivering.result(PROMPT) is False


def test_wait_goes_on_while_channels_say_something() -> None:
    barrier = joined(0)
    waiting = background(lambda: barrier.main(0.3))
    began = time.monotonic()
    while time.monotonic() - began < 0.6:
        barrier.heard()
        assert not waiting.done()
    delivering = background(lambda: barrier.deliver(0))
    waiting.result(PROMPT)
    assert delivering.result(PROMPT)


def test_closed_channel_ends_the_wait_at_once() -> None:
    barrier = joined(0, 1)
    main = blocked(lambda: barrier.main(PROMPT))
    barrier.leave(1)
    with pytest.raises(PeerError, match="closed multifd channel 1 before synchronisation 1"):
        main.result(PROMPT)


def test_channel_may_leave_when_it_has_delivered() -> None:
    barrier = joined(0)
    delivering = background(lambda: barrier.deliver(0))
    barrier.main(PROMPT)
    delivering.result(PROMPT)
    barrier.leave(0)
    barrier.finish()


def test_break_off_wakes_everybody() -> None:
    barrier = joined(0, 1)
    waiting = blocked(lambda: barrier.deliver(0))
    main = blocked(lambda: barrier.main(None))
    barrier.break_off()
    assert waiting.result(PROMPT) is False
    main.result(PROMPT)
    assert barrier.deliver(1) is False


def test_pages_behind_the_last_synchronisation_are_refused() -> None:
    barrier = joined(0, 1)
    barrier.begin(1)
    with pytest.raises(StreamError, match="no pages behind the last synchronisation") as caught:
        barrier.finish()
    assert caught.value.place.channel == "multifd 1"


def test_pages_behind_the_end_are_refused_in_their_channel() -> None:
    barrier = joined(0)
    barrier.finish()
    with pytest.raises(StreamError, match="no pages behind the last synchronisation"):
        barrier.begin(0)
