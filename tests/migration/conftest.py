"""The fixture of this directory: what belongs to a test, and ends with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.transports.support import wait_until


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closed behind the test; no thread is left then."""
    before = set(threading.enumerate())
    with ExitStack() as made:
        yield made
    wait_until(lambda: set(threading.enumerate()) <= before)
