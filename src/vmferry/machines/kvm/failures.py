"""What is said of a guest that cannot go on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmferry.errors import MachineError


class CpuFailure(MachineError):
    """A vCPU cannot go on; ``registers`` are what it held, by their usual names."""

    def __init__(self, what: str, registers: Mapping[str, int]) -> None:
        self.registers = dict(registers)
        shown = " ".join(f"{name}={value:#x}" for name, value in registers.items())
        super().__init__(f"{what}; {shown}")

    def to_json(self) -> dict[str, Any]:
        """Also ``registers``."""
        return super().to_json() | {"registers": self.registers}
