"""A serial port with the registers of a 16550 (National Semiconductor PC16550D, table 2).

It has no interrupts: a guest looks into the line status.  What it sends goes out at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Final

from vmferry.errors import UsageError
from vmferry.vmstate import U8, U16, U32, Local, VarBuffer, device

DATA, INTERRUPTS, FIFO, LINE, MODEM, LINE_STATUS, MODEM_STATUS, SCRATCH = range(8)

_DIVISOR_LATCH: Final = 0x80  # in LINE: the first two registers are the divisor
_READY: Final = 0x01  # in LINE_STATUS: there is input
_EMPTY: Final = 0x60  # in LINE_STATUS: all was sent
_NO_INTERRUPT: Final = 0x01
_CONNECTED: Final = 0xB0  # in MODEM_STATUS: carrier, data set ready, clear to send
_INPUT: Final = 4096


@device("serial", version=1)
@dataclass(slots=True)
class Serial:
    """A serial port; ``output`` gets what the guest sends, in the thread of the vCPU."""

    output: Local[Callable[[bytes], None]]
    interrupts: U8 = 0
    fifo: U8 = 0
    line: U8 = 0
    modem: U8 = 0
    scratch: U8 = 0
    divisor: U16 = 1
    waiting: U32 = 0
    input: Annotated[bytearray, VarBuffer("waiting", _INPUT)] = field(default_factory=bytearray)

    def pre_save(self) -> None:
        """Count the input that was not read yet."""
        self.waiting = len(self.input)

    def post_load(self, version: int) -> None:  # noqa: ARG002
        """Input goes on to grow."""
        self.input = bytearray(self.input)

    def receive(self, data: bytes) -> None:
        """Add to what the guest may read; raises :class:`UsageError` where it reads nothing."""
        if len(self.input) + len(data) > _INPUT:
            raise UsageError(f"the guest has {len(self.input)} bytes to read on its serial port")
        self.input += data

    def read(self, offset: int, size: int) -> int:  # noqa: ARG002
        """A register; DATA takes the next byte of input."""
        latch = self.line & _DIVISOR_LATCH
        if offset == DATA and not latch:
            return self._next()
        return (
            self.divisor & 0xFF,
            self.divisor >> 8 if latch else self.interrupts,
            self.fifo & 0xC0 | _NO_INTERRUPT,
            self.line,
            self.modem,
            _EMPTY | (_READY if self.input else 0),
            _CONNECTED,
            self.scratch,
        )[offset]

    def write(self, offset: int, size: int, value: int) -> None:  # noqa: ARG002
        """A register; DATA sends a byte."""
        value &= 0xFF
        latch = self.line & _DIVISOR_LATCH
        match offset:
            case 0 if latch:
                self.divisor = self.divisor & 0xFF00 | value
            case 0:
                self.output(bytes([value]))
            case 1 if latch:
                self.divisor = self.divisor & 0xFF | value << 8
            case 1:
                self.interrupts = value & 0x0F
            case 2:
                self.fifo = value
            case 3:
                self.line = value
            case 4:
                self.modem = value & 0x1F
            case 7:
                self.scratch = value

    def _next(self) -> int:
        return self.input.pop(0) if self.input else 0
