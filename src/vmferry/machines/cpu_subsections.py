"""The parts of a vCPU's state that not every host has, or that are seldom other than after a reset.

Each is a subsection of ``cpu``, sent only where there is something to send.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from vmferry.vmstate import U8, U16, U32, U64, VarArray, VarBuffer, state

MAX_LEAVES: Final = 256
MAX_MSRS: Final = 1024
MAX_COMPONENT: Final = 64 << 10
"""Bytes; the largest there is, the tiles of AMX, has 8 KiB."""


@state("cpu/cpuid-leaf")
@dataclass(slots=True)
class Leaf:
    """What ``cpuid`` says for eax = ``function`` and, where ``indexed`` is 1, ecx = ``index``."""

    function: U32 = 0
    index: U32 = 0
    indexed: U8 = 0
    eax: U32 = 0
    ebx: U32 = 0
    ecx: U32 = 0
    edx: U32 = 0


@state("cpu/cpuid")
@dataclass(slots=True)
class Cpuid:
    """What the guest was told of its processor, and may rely upon.

    A host that cannot choose what its guest is told, as Unicorn, has none and ignores it.
    """

    count: U16 = 0
    leaves: Annotated[list[Leaf], VarArray("count", MAX_LEAVES)] = field(default_factory=list)


@state("cpu/xsave-component")
@dataclass(slots=True)
class Component:
    """One component of the XSAVE area that is in use; ``number`` is its bit in XCR0.

    ``offset`` is where it stands in the standard format.  The guest's own XSAVE puts it there.
    """

    number: U8 = 0
    offset: U32 = 0
    size: U32 = 0
    data: Annotated[bytes, VarBuffer("size", MAX_COMPONENT)] = b""


@state("cpu/xsave")
@dataclass(slots=True)
class Xsave:
    """XCR0, and the XSAVE components behind x87 and SSE that are not as after a reset."""

    xcr0: U64 = 1
    count: U8 = 0
    components: Annotated[list[Component], VarArray("count", 62)] = field(default_factory=list)


@state("cpu/msr")
@dataclass(slots=True)
class Msr:
    """A model-specific register and its value."""

    index: U32 = 0
    value: U64 = 0


@state("cpu/other-msrs")
@dataclass(slots=True)
class OtherMsrs:
    """The model-specific registers without a name in ``cpu/msrs`` that were changed, by number."""

    count: U16 = 0
    msrs: Annotated[list[Msr], VarArray("count", MAX_MSRS)] = field(default_factory=list)


@state("cpu/events")
@dataclass(slots=True)
class Events:
    """What is on its way to the vCPU between two instructions, as KVM's ``kvm_vcpu_events``."""

    exception_injected: U8 = 0
    exception_nr: U8 = 0
    exception_has_error_code: U8 = 0
    exception_error_code: U32 = 0
    interrupt_injected: U8 = 0
    interrupt_nr: U8 = 0
    interrupt_soft: U8 = 0
    interrupt_shadow: U8 = 0
    nmi_injected: U8 = 0
    nmi_pending: U8 = 0
    nmi_masked: U8 = 0
