"""Threads that do something at the same moment, as nearly as can be."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from tests.transports.support import PROMPT, background

T = TypeVar("T")


def at_once(*calls: Callable[[], T]) -> list[T]:
    """Call each in a thread of its own, none before all threads are there; what they return."""
    start = threading.Barrier(len(calls))

    def one(call: Callable[[], T]) -> T:
        start.wait(PROMPT)
        return call()

    running = [background(partial(one, call)) for call in calls]
    return [future.result(PROMPT) for future in running]
