"""What the engine sees of a machine that runs: its memory, its devices, and how to stop it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from vmferry.images import Image
from vmferry.memory import DirtyLog, GuestMemory

from .saving import Machine


class LiveMachine(Machine, Protocol):
    """A machine that may run; its registry has the state of its processors too."""

    @property
    def uuid(self) -> UUID | None:
        """Its own UUID, if it has one; compared with capability ``validate-uuid``."""

    @property
    def memory(self) -> GuestMemory:
        """Its RAM blocks."""

    @property
    def images(self) -> Sequence[Image]:
        """The images of its disks; the engine has them active where it may run, nowhere else."""

    @property
    def vcpu_threads(self) -> Sequence[int]:
        """The kernel's ids of the threads of its processors; empty where they have none."""

    @property
    def running(self) -> bool:
        """Whether it runs, or would if it had something to do."""

    def pause(self) -> None:
        """Stop it: when this returns nothing writes its memory or devices.  Idempotent.

        Where it has to wait for long, as for storage, :meth:`resume` by another thread should end
        the wait, with an error.
        """

    def resume(self) -> None:
        """Let it run, from where it was stopped or from the state that was loaded.  Idempotent."""

    def throttle(self, percent: int) -> None:
        """Keep its processors from running for a share of the time, 0 to 99."""

    def dirty_log(self) -> DirtyLog:
        """A log of the pages that it writes, not started yet."""
