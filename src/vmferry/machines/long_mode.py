"""A vCPU as the guest finds it: in 64-bit mode with flat segments and paging, at its entry."""

from __future__ import annotations

from .cpu_state import RDI, RSP, CpuState, Segment, Table
from .guest.layout import CODE, GDT, Layout
from .guest.program import DESCRIPTORS

_CR0 = 0x80010033  # PG, WP, NE, ET, MP, PE
_CR4 = 0x620  # OSXMMEXCPT, OSFXSR, PAE
_EFER = 0xD00  # NXE, LMA, LME


def enter(state: CpuState, layout: Layout, index: int) -> None:
    """Set *state* to the first instruction of the vCPU *index*; the rest of it is after a reset."""
    block = layout.block(index)
    state.registers[RDI] = block
    state.registers[RSP] = block
    state.rip = CODE
    state.cs = Segment(0x08, 0, 0xFFFFFFFF, 0xA09B)
    state.ds = state.es = state.ss = Segment(0x10, 0, 0xFFFFFFFF, 0xC093)
    state.fs = state.gs = state.ldtr = Segment()
    state.tr = Segment(0, 0, 0xFFFF, 0x008B)
    state.gdt = Table(GDT, 8 * len(DESCRIPTORS) - 1)
    state.cr0, state.cr3, state.cr4, state.efer = _CR0, layout.tables, _CR4, _EFER
