"""A vCPU as the guest finds it: in 64-bit mode with flat segments and paging, at its entry.

In ring 3, and all ports are allowed there: where KVM has no help of the hardware, that is what it
runs by itself, while it has to emulate code of ring 0.  So the guest has no ``hlt``; it rests by a
port of the interval timer.
"""

from __future__ import annotations

from .cpu_state import RDI, RSP, CpuState, Segment, Table
from .guest.layout import CODE, GDT, Layout
from .guest.program import DESCRIPTORS

_RING = 3
_RFLAGS = 0x3002  # IOPL 3
_CR0 = 0x80010033  # PG, WP, NE, ET, MP, PE
_CR4 = 0x620  # OSXMMEXCPT, OSFXSR, PAE
_EFER = 0xD00  # NXE, LMA, LME


def enter(state: CpuState, layout: Layout, index: int) -> None:
    """Set *state* to the first instruction of the vCPU *index*; the rest of it is after a reset."""
    block = layout.block(index)
    state.registers[RDI] = block
    state.registers[RSP] = block
    state.rip = CODE
    state.rflags = _RFLAGS
    state.cs = Segment(0x08 | _RING, 0, 0xFFFFFFFF, 0xA09B | _RING << 5)
    state.ds = state.es = state.ss = Segment(0x10 | _RING, 0, 0xFFFFFFFF, 0xC093 | _RING << 5)
    state.fs = state.gs = state.ldtr = Segment()
    state.tr = Segment(0, 0, 0xFFFF, 0x008B)
    state.gdt = Table(GDT, 8 * len(DESCRIPTORS) - 1)
    state.cr0, state.cr3, state.cr4, state.efer = _CR0, layout.tables, _CR4, _EFER
