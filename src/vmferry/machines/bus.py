"""Which device answers at which port and at which address of memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol


class Registers(Protocol):
    """What a device has for the bus; offsets count from where it was put."""

    def read(self, offset: int, size: int) -> int:
        """The value of *size* bytes at *offset*."""

    def write(self, offset: int, size: int, value: int) -> None:
        """*value* of *size* bytes goes to *offset*."""


Space = list[tuple[range, Registers]]


@dataclass(slots=True)
class DeviceBus:
    """The devices of a board, one access at a time (:class:`vmferry.machines.cpu.Bus`)."""

    ports: Space = field(default_factory=list)
    memory: Space = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def port_read(self, port: int, size: int) -> int:
        """``in``; all ones where no device is."""
        return self._read(self.ports, port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """``out``; ignored where no device is."""
        self._write(self.ports, port, size, value)

    def memory_read(self, address: int, size: int) -> int:
        """A load; all ones where no device is."""
        return self._read(self.memory, address, size)

    def memory_write(self, address: int, size: int, value: int) -> None:
        """A store; ignored where no device is."""
        self._write(self.memory, address, size, value)

    def _read(self, space: Space, address: int, size: int) -> int:
        for place, device in space:
            if address in place:
                with self._lock:
                    return device.read(address - place.start, size)
        return (1 << 8 * size) - 1

    def _write(self, space: Space, address: int, size: int, value: int) -> None:
        for place, device in space:
            if address in place:
                with self._lock:
                    return device.write(address - place.start, size, value)
        return None
