"""A position in the parts of one send: what the next gathered write takes, unjoined."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

from .base import Buffer

IOV_MAX: Final = os.sysconf("SC_IOV_MAX")
"""How many parts the kernel takes in one call."""


class Gather:
    """A cursor over *parts*.  Borrows them: they must not change before it is used up."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self._parts = list(parts)
        self._sizes = [p.nbytes if isinstance(p, memoryview) else len(p) for p in parts]
        self._next = 0
        self.left = sum(self._sizes)
        """Bytes that are still to be sent."""
        self._window = 0
        self._whole = False

    def window(self, most: int = sys.maxsize) -> list[Buffer]:
        """The parts for the next write, *most* bytes in all at most; empty when all is sent."""
        if not self.left:
            return []
        while not (count := sum(self._sizes[self._next : self._next + IOV_MAX])):
            self._next += IOV_MAX  # nothing but empty parts: a write of them would never end
        self._window = min(count, most)
        self._whole = count <= most
        taken = self._parts[self._next : self._next + IOV_MAX]
        return taken if self._whole else self._first(taken, most)

    @property
    def window_size(self) -> int:
        """Bytes in the last window."""
        return self._window

    def sent(self, count: int) -> None:
        """Go on behind *count* bytes of the last window, which may end within a part."""
        self.left -= count
        if self._whole and count == self._window:  # nearly always; spares a step per part
            self._next += IOV_MAX
            return
        while count:
            size = self._sizes[self._next]
            if count < size:
                self._parts[self._next] = memoryview(self._parts[self._next]).cast("B")[count:]
                self._sizes[self._next] = size - count
                return
            count -= size
            self._next += 1

    def _first(self, parts: list[Buffer], most: int) -> list[Buffer]:
        taken: list[Buffer] = []
        for part, size in zip(parts, self._sizes[self._next :], strict=False):
            if size >= most:
                taken.append(memoryview(part).cast("B")[:most])
                break
            taken.append(part)
            most -= size
        return taken
