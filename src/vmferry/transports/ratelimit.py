"""A limit on the rate at which any number of channels and threads send together.

The bucket is one point in time, the moment from which the next portion may go.  A portion of
*n* bytes moves it by *n*/rate seconds, so what is owed is counted in time and a change of the
rate takes effect at the next portion.  In any second at most 1.045 times the rate passes: 40 ms
that an idle or late sender may catch up on, and one portion of 5 ms.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Final, Protocol

from vmferry.errors import ChannelClosed, UsageError

from .base import Buffer, Channel
from .gather import Gather
from .wrapped import WrappedChannel

_CATCH_UP: Final = 0.040
"""Seconds of unused time that a sender may make up for, so that a late wake-up costs nothing."""

_PORTION: Final = 0.005
"""Seconds' worth of bytes that go at once."""

_PORTION_MAX: Final = 4 << 20
"""Bytes that go at once at any rate, so that a limit set during a long send is soon heeded."""


class Clock(Protocol):
    """Time as the limit sees it: seconds from any fixed point, and waiting."""

    def now(self) -> float:
        """The time."""

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        """Wait for *changed*, whose lock is held, *seconds* at most."""


class _SystemClock:
    def now(self) -> float:
        return time.monotonic()

    def wait(self, changed: threading.Condition, seconds: float) -> None:
        changed.wait(min(seconds, threading.TIMEOUT_MAX))


class RateLimit:
    """*rate* bytes per second, ``None`` for no limit, shared by all who hold this object."""

    def __init__(self, rate: float | None = None, *, clock: Clock | None = None) -> None:
        self._clock = clock or _SystemClock()
        self._changed = threading.Condition()
        self._rate = _checked(rate)
        self._free_at = self._clock.now()
        self._is_shut = False

    @property
    def rate(self) -> float | None:
        """Bytes per second; may be set by any thread at any moment, and takes effect at once."""
        return self._rate

    @rate.setter
    def rate(self, rate: float | None) -> None:
        with self._changed:
            old, self._rate = self._rate, _checked(rate)
            owed = self._free_at - self._clock.now()
            if owed > 0 and old is not None and rate is not None:
                # A faster rate works it off faster; a slower one must not make it longer.
                self._free_at -= owed * max(0.0, 1 - old / rate)
            self._changed.notify_all()

    def take(self, nbytes: int) -> None:
        """Wait until *nbytes* may be sent.

        Raises :class:`ChannelClosed` when the limit is shut down; some may have been taken.
        """
        while nbytes > 0:
            nbytes -= self.take_some(nbytes)

    def take_some(self, wanted: int) -> int:
        """Wait until the next portion may be sent; its size, at most *wanted* bytes."""
        with self._changed:
            while True:
                if self._is_shut:
                    raise ChannelClosed("the rate limit was shut down on this side")
                rate = self._rate
                if rate is None:
                    return min(wanted, _PORTION_MAX)
                now = self._clock.now()
                if now >= self._free_at:
                    portion = max(1, min(wanted, _PORTION_MAX, int(rate * _PORTION)))
                    self._free_at = max(self._free_at, now - _CATCH_UP) + portion / rate
                    return portion
                self._clock.wait(self._changed, self._free_at - now)

    def due(self) -> float:
        """Seconds until the next portion may be sent; 0 where it may now."""
        with self._changed:
            return 0.0 if self._rate is None else max(self._free_at - self._clock.now(), 0.0)

    def spend(self, nbytes: int) -> None:
        """Note that *nbytes* are sent at once, for those who wait for :meth:`due` elsewhere."""
        with self._changed:
            if self._rate is not None:
                since = max(self._free_at, self._clock.now() - _CATCH_UP)
                self._free_at = since + nbytes / self._rate

    def shutdown(self) -> None:
        """Make every :meth:`take`, now and later, raise :class:`ChannelClosed`."""
        with self._changed:
            self._is_shut = True
            self._changed.notify_all()


class LimitedChannel(WrappedChannel):
    """A channel whose sending keeps to a limit; created by :func:`limited`."""

    def __init__(self, channel: Channel, limit: RateLimit) -> None:
        super().__init__(channel)
        self._limit = limit

    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """See :meth:`Channel.send`; goes out in portions of 5 ms."""
        gather = Gather(parts)
        while gather.left:
            self._channel.send(gather.window(self._limit.take_some(gather.left)), timeout)
            gather.sent(gather.window_size)

    def send_file(
        self, head: bytes, descriptor: int, offset: int, count: int, timeout: float | None = None
    ) -> None:
        """See :meth:`Channel.send_file`; goes out in portions of 5 ms."""
        self._limit.take(len(head))
        while count:
            portion = self._limit.take_some(count)
            self._channel.send_file(head, descriptor, offset, portion, timeout)
            head = b""
            offset += portion
            count -= portion


def limited(channel: Channel, limit: RateLimit) -> Channel:
    """*channel*, sending no faster than *limit* allows it and whoever shares the limit."""
    return LimitedChannel(channel, limit)


def _checked(rate: float | None) -> float | None:
    if rate is not None and not (rate > 0 and math.isfinite(rate)):
        raise UsageError(f"expected a rate above 0 bytes per second, or none, found {rate}")
    return rate
