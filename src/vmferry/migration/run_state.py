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
IO_ERROR: Final = "io-error"


@device("globalstate", version=1)
@dataclass
class RunState:
    """The name of a run state, with a NUL behind it, and the size of both."""

    size: U32 = 0
    text: Annotated[bytes, Buffer(_SIZE)] = bytes(_SIZE)

    @classmethod
    def of(cls, state: str) -> RunState:
        """One of the three that a machine can be loaded in."""
        name = state.encode() + b"\0"
        return cls(len(name), name.ljust(_SIZE, b"\0"))

    @property
    def name(self) -> str:
        """The name: where it is ``running`` the machine goes on where it is loaded."""
        return self.text.rstrip(b"\0").decode()

    def post_load(self, _version: int) -> None:
        """Refuse what is no run state of a machine that can be loaded."""
        if self.text.rstrip(b"\0") not in {s.encode() for s in (RUNNING, PAUSED, IO_ERROR)}:
            raise ValueError("the run state is running, paused or io-error")
