"""What a vCPU holds, declared once for every host: the section ``cpu``.

Registers are in the order of their encoding (AMD64 Architecture Programmer's Manual, volume 3,
1.8.2): rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.  The x87 and SSE state is that of
``fxsave64``, field by field.  What only some host has goes into a subsection that is sent only
where it is not as after a reset, so that every host loads what every other saved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Protocol

from vmferry.vmstate import (
    U8,
    U16,
    U32,
    U64,
    Array,
    Buffer,
    Local,
    device,
    state,
    subsection,
)

from .cpu_subsections import Cpuid, Events, OtherMsrs, Xsave

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


@state("cpu/segment")
@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part.

    ``attributes`` are bits 8 to 23 of the high half of the descriptor, without those of the limit,
    as in VMX: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15.  A register that must not
    be used, as after loading a null selector, is not present (P).  ``limit`` is in bytes.
    """

    selector: U16 = 0
    base: U64 = 0
    limit: U32 = 0
    attributes: U16 = 0


@state("cpu/table")
@dataclass(slots=True)
class Table:
    """``gdtr`` or ``idtr``."""

    base: U64 = 0
    limit: U16 = 0


@state("cpu/fpu")
@dataclass(slots=True)
class Fpu:
    """x87 and SSE, as ``fxsave64`` stores them.

    ``registers`` are st0 to st7 in 16 bytes each, of which 10 count; ``tags`` has a bit for each
    physical register that is not empty; ``xmm`` are xmm0 to xmm15.
    """

    control: U16 = 0x37F
    status: U16 = 0
    tags: U8 = 0
    opcode: U16 = 0
    instruction: U64 = 0
    operand: U64 = 0
    mxcsr: U32 = 0x1F80
    registers: Annotated[bytes, Buffer(128)] = bytes(128)
    xmm: Annotated[bytes, Buffer(256)] = bytes(256)


@state("cpu/msrs")
@dataclass(slots=True)
class Msrs:
    """Model-specific registers that a 64-bit guest may have set, by their usual names.

    ``efer`` stands among the control registers.
    """

    star: U64 = 0
    lstar: U64 = 0
    cstar: U64 = 0
    sfmask: U64 = 0
    kernel_gs_base: U64 = 0
    sysenter_cs: U64 = 0
    sysenter_esp: U64 = 0
    sysenter_eip: U64 = 0
    pat: U64 = 0x0007_0406_0007_0406
    tsc: U64 = 0
    tsc_aux: U64 = 0


class Holder(Protocol):
    """The vCPU behind a state."""

    def read(self, state: CpuState) -> None:
        """As :meth:`vmferry.machines.cpu.Vcpu.read`."""

    def write(self, state: CpuState) -> None:
        """As :meth:`vmferry.machines.cpu.Vcpu.write`."""


@device("cpu", version=1)
@dataclass(slots=True)
class CpuState:
    """All that a vCPU holds.  One is registered for each; its instance is the vCPU's number.

    It is read from its ``holder`` when it is saved, and given to it when it was loaded.
    """

    holder: Local[Holder]
    registers: Annotated[list[U64], Array(16)] = field(default_factory=lambda: [0] * 16)
    rip: U64 = 0
    rflags: U64 = 2
    es: Segment = field(default_factory=Segment)
    cs: Segment = field(default_factory=Segment)
    ss: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ldtr: Segment = field(default_factory=Segment)
    tr: Segment = field(default_factory=Segment)
    gdt: Table = field(default_factory=Table)
    idt: Table = field(default_factory=Table)
    cr0: U64 = 0
    cr2: U64 = 0
    cr3: U64 = 0
    cr4: U64 = 0
    cr8: U64 = 0
    efer: U64 = 0
    debug: Annotated[list[U64], Array(6)] = field(  # dr0 to dr3, dr6, dr7
        default_factory=lambda: [0, 0, 0, 0, 0xFFFF0FF0, 0x400]
    )
    fpu: Fpu = field(default_factory=Fpu)
    msrs: Msrs = field(default_factory=Msrs)
    cpuid: Annotated[Cpuid | None, subsection] = None
    xsave: Annotated[Xsave | None, subsection] = None
    other_msrs: Annotated[OtherMsrs | None, subsection] = None
    events: Annotated[Events | None, subsection] = None

    def pre_save(self) -> None:
        """Take what the vCPU holds."""
        self.holder.read(self)

    def post_load(self, version: int) -> None:  # noqa: ARG002
        """Give the vCPU what was loaded; what it refuses is refused."""
        self.holder.write(self)
