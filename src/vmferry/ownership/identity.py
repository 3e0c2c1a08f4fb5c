"""Who a process is, so that another one on the same host can tell that it has ended."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_LOOK: Final = 0.01

NUMBERS: Final = 4
"""How many numbers make an identity."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of a host.

    ``host`` is a hash of the boot and the PID namespace; ``started`` is in clock ticks since the
    boot, modulo 2**32 (``proc(5)``, field 22 of ``stat``), and tells a reused PID.
    """

    host: int
    pid: int
    started: int

    @classmethod
    def own(cls) -> Self:
        """The process that asks."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """A process of this host; raises :class:`OSError` where there is none."""
        return cls(_host(), pid, _state(pid)[1])

    def numbers(self) -> tuple[int, ...]:
        """As four numbers of 32 bits."""
        return self.host >> 32, self.host & 0xFFFFFFFF, self.pid, self.started

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Self:
        """From what :meth:`numbers` gave."""
        high, low, pid, started = numbers
        return cls(high << 32 | low, pid, started)

    def dies_within(self, seconds: float) -> bool:
        """As :meth:`is_dead`, for a process that seems to be dying.

        Its connections are closed before it counts as ended.
        """
        deadline = time.monotonic() + seconds
        while not self.is_dead():
            if self.host != _host() or time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
        return True

    def is_dead(self) -> bool:
        """Whether the process has certainly ended; false where that cannot be known."""
        if self.host != _host():
            return False
        try:
            state, started = _state(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return not _exists(self.pid)
        except OSError:
            return False
        if started != self.started:
            return True
        return state in "XZ" and not _other_threads(self.pid)


def _host() -> int:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    digest = hashlib.blake2b(f"{boot} {namespace}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)


def _state(pid: int) -> tuple[str, int]:
    """The state of a process, and when it started."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19]) & 0xFFFFFFFF


def _exists(pid: int) -> bool:
    """Whether there is a process that ``/proc`` may hide (``hidepid``)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return True


def _other_threads(pid: int) -> bool:
    """Whether threads go on after a process's main thread has ended."""
    try:
        return any(task.name != str(pid) for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False
