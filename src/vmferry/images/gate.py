"""A lock of two kinds: shared by any number of requests, or held by one thread alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Requests pass together; who wants it alone waits for them, and later ones wait for him."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._claims = 0
        self._alone = False

    @property
    def busy(self) -> bool:
        """Whether anybody is inside, or waits to be alone."""
        return bool(self._inside or self._claims)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, nobody is alone."""
        with self._changed:
            while self._claims:
                self._changed.wait()
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, there is nobody else."""
        with self._changed:
            self._claims += 1
            try:
                while self._inside or self._alone:
                    self._changed.wait()
                self._alone = True
            except BaseException:
                self._leave()
                raise
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._leave()

    def _leave(self) -> None:
        self._claims -= 1
        self._changed.notify_all()
