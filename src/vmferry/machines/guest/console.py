"""What the guest says on its serial port, and what that tells of time.

Lines, numbers in 16 hex digits::

    F time wall hot cold                heartbeat while some page was not written yet
    H time wall hot cold                heartbeat
    E vcpu kind page expected found     a page or a counter is wrong: the guest has stopped

``time`` is guest time and ``wall`` the wall clock at the same instant, in ns; ``hot`` and ``cold``
are how many pages were rewritten and read so far, on all vCPUs together.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmferry.errors import MachineError

KINDS: Final = {
    1: "lost",
    2: "misplaced",
    3: "stale",
    4: "torn",
    5: "registers that disagree",
    6: "counters that disagree",
    7: "unlike what was written to the disk",
}

_JOURNAL: Final = 7

# Whole lines only: the first one after a migration may be the second half of one.
_LINE: Final = re.compile(r"([FHE])((?: [0-9a-f]{16}){4,5})")
_KEPT: Final = 4096
_LONGEST: Final = 128


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life; times in ns, pages counted since the guest began."""

    time: int
    wall: int
    hot: int
    cold: int
    filled: bool

    def stood_still(self, since: Heartbeat) -> int:
        """For how many ns guest time stood still since another heartbeat, by the guest's clocks.

        The first heartbeat behind a pause may have been on its way before, and tell of that time.
        """
        return (self.wall - since.wall) - (self.time - since.time)


@dataclass(frozen=True, slots=True)
class Report:
    """What a vCPU found wrong: page *page* of the working set, or what it counts."""

    vcpu: int
    kind: int
    page: int
    expected: int
    found: int

    def __str__(self) -> str:
        kind = KINDS.get(self.kind, f"wrong in a way of number {self.kind}")
        if self.kind == _JOURNAL:
            what = f"record {self.page} is {kind}"
        else:
            what = f"page {self.page} is {kind}" if self.kind < 5 else f"there are {kind}"
        return f"vCPU {self.vcpu}: {what}: expected {self.expected:#x}, found {self.found:#x}"


class Console:
    """Reads lines as they come; ``serial`` of a machine may be :meth:`feed`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._rest = b""
        self.beats: deque[Heartbeat] = deque(maxlen=_KEPT)
        self.count = 0
        self.reports: list[Report] = []

    def feed(self, data: bytes) -> None:
        """Take what the guest sent, in pieces of any size."""
        self._rest += data
        if b"\n" in data:
            *lines, self._rest = self._rest.split(b"\n")
            with self._changed:
                for line in lines:
                    self._take(line.decode("ascii", "replace"))
                self._changed.notify_all()
        self._rest = self._rest[-_LONGEST:]

    def wait_beat(self, timeout: float = 30.0) -> Heartbeat:
        """The next heartbeat from now on."""
        count = self.count
        return self._wait(lambda: self.count > count, timeout)

    def wait_filled(self, timeout: float = 120.0) -> Heartbeat:
        """A heartbeat that says that every page was written."""
        return self._wait(lambda: bool(self.beats) and self.beats[-1].filled, timeout)

    def check(self) -> None:
        """Raise :class:`MachineError` if the guest has found something wrong."""
        if self.reports:
            raise MachineError(f"the guest found an error: {self.reports[0]}")

    def _wait(self, met: Callable[[], bool], timeout: float) -> Heartbeat:
        """Wait until *met*; raises :class:`MachineError` after *timeout* s, and for a report."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not met():
                self.check()
                if not self._changed.wait(deadline - time.monotonic()):
                    last = self.beats[-1] if self.beats else "nothing"
                    raise MachineError(f"the guest is silent for {timeout:g} s; last: {last}")
            return self.beats[-1]

    def _take(self, line: str) -> None:
        if (match := _LINE.fullmatch(line)) is None:
            return
        match match[1], [int(number, 16) for number in match[2].split()]:
            case "E", [vcpu, kind, page, expected, found]:
                self.reports.append(Report(vcpu, kind, page, expected, found))
            case "F" | "H" as tag, [guest, wall, hot, cold]:
                self.beats.append(Heartbeat(guest, wall, hot, cold, filled=tag == "H"))
                self.count += 1
