"""The section ``globalstate``: what the machine did before it was stopped for the migration.

QEMU 7.2 ``migration/global_state.c``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Final

from vmferry.vmstate import U32, Buffer, device

_SIZE: Final = 100

RUNNING: Final = "running"
PAUSED: Final = "paused"


@device("globalstate", version=1)
@dataclass
class RunState:
    """The name of a run state, with a NUL behind it, and the size of both."""

    size: U32 = 0
    text: Annotated[bytes, Buffer(_SIZE)] = bytes(_SIZE)

    @classmethod
    def of(cls, *, running: bool) -> RunState:
        """The state of a machine that runs, or stands still."""
        name = (RUNNING if running else PAUSED).encode() + b"\0"
        return cls(len(name), name.ljust(_SIZE, b"\0"))

    @property
    def running(self) -> bool:
        """Whether the machine goes on where it is loaded."""
        return self.text.rstrip(b"\0").decode() == RUNNING

    def post_load(self, _version: int) -> None:
        """Refuse what is no run state of a machine that can be loaded."""
        if self.text.rstrip(b"\0") not in {RUNNING.encode(), PAUSED.encode()}:
            raise ValueError("the run state is running or paused")
