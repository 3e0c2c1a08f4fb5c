"""Waiting for descriptors, with a limit of time, and with a way to end the wait from outside."""

from __future__ import annotations

import math
import os
import select
import socket
from collections.abc import Iterable
from typing import Final, TypeAlias

Descriptor: TypeAlias = int | socket.socket


_LONGEST: Final = 2**31 - 1
"""Milliseconds that ``poll(2)`` can count: 24 days."""


def ready(descriptors: Iterable[Descriptor], events: int, timeout: float | None) -> bool:
    """Whether one of *descriptors* shows *events*, an error or its end within *timeout* seconds."""
    return _wait([(descriptor, events) for descriptor in descriptors], timeout)


def _wait(wanted: Iterable[tuple[Descriptor, int]], timeout: float | None) -> bool:
    poll = select.poll()
    for descriptor, events in wanted:
        poll.register(descriptor, events)
    # Rounded up, so that a wait is never shorter than asked for.
    limit = None if timeout is None else min(math.ceil(timeout * 1000), _LONGEST)
    return bool(poll.poll(limit))


class Wakeup:
    """Waits that any thread can end, for good.

    An ``eventfd`` stands beside whatever is waited for, and once set it stays readable: a wait
    that begins later ends at once.
    """

    def __init__(self) -> None:
        self._event = os.eventfd(0)

    def wait(self, descriptors: Iterable[Descriptor], events: int, timeout: float | None) -> bool:
        """As :func:`ready`; also true, at once, when :meth:`set` was called."""
        wanted = [(descriptor, events) for descriptor in descriptors]
        return _wait([*wanted, (self._event, select.POLLIN)], timeout)

    def set(self) -> None:
        """End every wait, now and later."""
        os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """Give the descriptor back; nobody may be waiting."""
        os.close(self._event)
