"""A port by which the guest ends: the byte that is written is its exit status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vmferry.vmstate import U8, Local, device


@device("debug-exit", version=1)
@dataclass(slots=True)
class DebugExit:
    """Whether the guest has ended, and how; ``ended`` is called when it does."""

    ended: Local[Callable[[], None]]
    over: bool = False
    status: U8 = 0

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """The status, 0 before the end."""
        return self.status

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """End; the first status counts."""
        if not self.over:
            self.over, self.status = True, value & 0xFF
            self.ended()
