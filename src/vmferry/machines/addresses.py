"""Where the board has its memory and its devices, for processors."""

from __future__ import annotations

from typing import Final

SERIAL_PORT: Final = 0x3F8
CLOCK_PORT: Final = 0x70
EXIT_PORT: Final = 0xF4
REST_PORT: Final = 0x500
"""The first of the interval timer's ports, one for each vCPU."""

TIMER: Final = 0xFED00000
"""The interval timer, in physical memory; each vCPU has registers of its own there."""

TIMER_STRIDE: Final = 16
"""Bytes between the registers of two vCPUs."""

DISK: Final = 0xFED10000
"""The registers of the first disk, in physical memory."""

DISK_STRIDE: Final = 0x100
"""Bytes between the registers of two disks."""

HOLE_START: Final = 3 << 30
HOLE_END: Final = 4 << 30
"""No RAM is there, but devices; RAM that does not fit below goes on above."""
