"""What is asked for of a restore, on its way to a page server."""

from __future__ import annotations

import pytest

from vmferry import LazyOptions
from vmferry.checkpoint.order import Order


@pytest.mark.parametrize(("seconds", "waits"), [(None, None), (60.0, 60), (2.5, 3), (0.5, 1)])
def test_timeout_is_whole_seconds_and_never_becomes_none(
    seconds: float | None, waits: int | None
) -> None:
    """0 is for ever: what is shorter than a second must not end as that."""
    order = Order(uri="unix:x", options=LazyOptions(idle=seconds, answer=seconds))
    options = Order.from_arguments(order.to_arguments()).options
    assert (options.idle, options.answer) == (waits, waits)
