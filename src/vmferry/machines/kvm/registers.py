"""All that KVM holds of a vCPU: fetched, set, and turned into the state that is declared.

Not among it are the local APIC and what belongs to it (the state of a processor that waits to be
started), as the VM has none; and the page directory pointers of 32-bit guests, which KVM reads
again from memory.
"""

from __future__ import annotations

import fcntl
import struct
from ctypes import Structure, sizeof
from dataclasses import dataclass
from typing import Final, TypeVar

from vmferry.machines import cpu_state, cpu_subsections
from vmferry.machines.cpu_state import CpuState
from vmferry.machines.cpu_subsections import Msr, OtherMsrs, Xsave

from . import abi, msrs, xsave
from .abi import DebugRegs, Events, Regs, Sregs, Xcrs

S = TypeVar("S", bound=Structure)

_GENERAL: Final = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
"""In the order of :attr:`~vmferry.machines.cpu_state.CpuState.registers`."""
_SEGMENTS: Final = {name: name for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr")} | {
    "ldtr": "ldt"
}
_TABLES: Final = ("gdt", "idt")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_PRESENT: Final = 0x80
_EVENTS: Final = tuple(cpu_subsections.Events.__dataclass_fields__)


@dataclass(slots=True)
class Held:
    """What a vCPU holds, as KVM gives and takes it."""

    regs: Regs
    sregs: Sregs
    xcr0: int
    area: bytearray
    msrs: dict[int, int]
    events: Events
    debug: DebugRegs


def fetch(vcpu: int, *, indices: list[int], area: int) -> Held:
    """What the vCPU with this descriptor holds; *area* are the bytes of its XSAVE area."""
    held = Held(
        regs=_get(vcpu, abi.GET_REGS, Regs()),
        sregs=_get(vcpu, abi.GET_SREGS, Sregs()),
        xcr0=_xcr0(_get(vcpu, abi.GET_XCRS, Xcrs())),
        area=bytearray(area),
        msrs=msrs.read(vcpu, indices),
        events=_get(vcpu, abi.GET_VCPU_EVENTS, Events()),
        debug=_get(vcpu, abi.GET_DEBUGREGS, DebugRegs()),
    )
    fcntl.ioctl(vcpu, abi.GET_XSAVE2 if area > abi.XSAVE_SIZE else abi.GET_XSAVE, held.area)
    return held


def put(vcpu: int, held: Held) -> None:
    """Make the vCPU hold that; raises ``ValueError`` with what it does not take.

    What stands before that in this order is changed by then: CR4 has to allow what XCR0 turns on.
    """
    xcrs = Xcrs(1)
    xcrs.xcrs[0].value = held.xcr0
    _set(vcpu, abi.SET_SREGS, held.sregs, "the segments and cr0 to cr8")
    # Once more, as KVM takes any EFER above.
    msrs.write(vcpu, {msrs.EFER: held.sregs.efer})
    _set(vcpu, abi.SET_XCRS, xcrs, f"xsave.xcr0 = {held.xcr0:#x}")
    _set(vcpu, abi.SET_XSAVE, held.area, "fpu and xsave")
    msrs.write(vcpu, {index: held.msrs[index] for index in held.msrs if index != msrs.TSC})
    _set(vcpu, abi.SET_REGS, held.regs, "registers")
    _set(vcpu, abi.SET_VCPU_EVENTS, held.events, "events")
    _set(vcpu, abi.SET_DEBUGREGS, held.debug, "debug")


def shown(held: Held) -> dict[str, int]:
    """The registers that tell where a guest went wrong."""
    values = {name: getattr(held.regs, name) for name in ("rip", "rflags", *_GENERAL)}
    values |= {name: getattr(held.sregs, name) for name in _CONTROL}
    return values | {name: getattr(held.sregs, name).selector for name in ("cs", "ss")}


# To the declared state


def fill(state: CpuState, held: Held, places: xsave.Places, reset: Held) -> None:
    """Fill *state* with what is *held*; what is as after a *reset* may be left out of it."""
    state.registers = [getattr(held.regs, name) for name in _GENERAL]
    state.rip, state.rflags = held.regs.rip, held.regs.rflags
    for name, theirs in _SEGMENTS.items():
        setattr(state, name, _from_segment(getattr(held.sregs, theirs)))
    for name in _TABLES:
        table = getattr(held.sregs, name)
        setattr(state, name, cpu_state.Table(table.base, table.limit))
    for name in _CONTROL:
        setattr(state, name, getattr(held.sregs, name))
    state.debug = [*held.debug.db, held.debug.dr6, held.debug.dr7]
    state.fpu, state.xsave = xsave.split(held.area, held.xcr0, places)
    named = {name: held.msrs.get(index, 0) for name, index in msrs.NAMES.items()}
    state.msrs = cpu_state.Msrs(**named)
    state.other_msrs = _changed_msrs(held, reset)
    events = cpu_subsections.Events(*(getattr(held.events, name) for name in _EVENTS))
    state.events = None if events == cpu_subsections.Events() else events


def _changed_msrs(held: Held, reset: Held) -> OtherMsrs | None:
    changed = [
        Msr(index, value)
        for index, value in sorted(held.msrs.items())
        if value != reset.msrs[index] and index not in msrs.NAMES.values()
    ]
    return OtherMsrs(len(changed), changed) if changed else None


def _from_segment(theirs: abi.Segment) -> cpu_state.Segment:
    attributes = (
        theirs.type
        | theirs.s << 4
        | theirs.dpl << 5
        | (theirs.present and not theirs.unusable) << 7
        | theirs.avl << 12
        | theirs.l << 13
        | theirs.db << 14
        | theirs.g << 15
    )
    return cpu_state.Segment(theirs.selector, theirs.base, theirs.limit, attributes)


# From the declared state


def held_by(state: CpuState, places: xsave.Places, reset: Held) -> Held:
    """What a vCPU is to hold; what *state* does not say is as after a *reset*.

    Raises ``ValueError`` for what this host does not have.
    """
    extended = state.xsave or Xsave()
    places.check(extended)
    return Held(
        regs=Regs(
            **dict(zip(_GENERAL, state.registers, strict=True)),
            rip=state.rip,
            rflags=state.rflags,
        ),
        sregs=_sregs(state, reset),
        xcr0=extended.xcr0,
        area=xsave.join(state.fpu, extended, len(reset.area)),
        msrs=_msrs(state, reset),
        events=_events(state),
        debug=_debug(state),
    )


def _sregs(state: CpuState, reset: Held) -> Sregs:
    sregs = Sregs(apic_base=reset.sregs.apic_base)
    for name, theirs in _SEGMENTS.items():
        setattr(sregs, theirs, _to_segment(getattr(state, name)))
    for name in _TABLES:
        table = getattr(state, name)
        setattr(sregs, name, abi.Table(table.base, table.limit))
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    return sregs


def _msrs(state: CpuState, reset: Held) -> dict[int, int]:
    values = dict(reset.msrs)
    for name, index in msrs.NAMES.items():
        value = getattr(state.msrs, name)
        if index in values:
            values[index] = value
        elif value:
            raise ValueError(f"msrs.{name}: the guest uses it, and this host has it not")
    for msr in state.other_msrs.msrs if state.other_msrs is not None else ():
        if msr.index not in values:
            raise ValueError(f"other_msrs: the guest uses {msr.index:#x}, and this host has it not")
        values[msr.index] = msr.value
    return values


def _events(state: CpuState) -> Events:
    flags = abi.EVENT_NMI_PENDING | abi.EVENT_SHADOW
    ours = state.events or cpu_subsections.Events()
    return Events(flags=flags, **{name: getattr(ours, name) for name in _EVENTS})


def _debug(state: CpuState) -> DebugRegs:
    *addresses, dr6, dr7 = state.debug
    debug = DebugRegs(dr6=dr6, dr7=dr7)
    debug.db[:] = addresses
    return debug


def _to_segment(ours: cpu_state.Segment) -> abi.Segment:
    bits = ours.attributes
    return abi.Segment(
        base=ours.base,
        limit=ours.limit,
        selector=ours.selector,
        type=bits & 0xF,
        s=bits >> 4 & 1,
        dpl=bits >> 5 & 3,
        present=bits >> 7 & 1,
        avl=bits >> 12 & 1,
        l=bits >> 13 & 1,
        db=bits >> 14 & 1,
        g=bits >> 15 & 1,
        unusable=not bits & _PRESENT,
    )


# Between this process and the kernel


def _get(vcpu: int, request: int, into: S) -> S:
    fcntl.ioctl(vcpu, request, into)
    return into


def _set(vcpu: int, request: int, value: Structure | bytearray, what: str) -> None:
    try:
        fcntl.ioctl(vcpu, request, value)
    except OSError as error:
        raise ValueError(f"{what}: this host does not take it ({error.strerror})") from error


def _xcr0(xcrs: Xcrs) -> int:
    return next((entry.value for entry in xcrs.xcrs[: xcrs.nr_xcrs] if entry.xcr == 0), 1)


def set_cpuid(vcpu: int, entries: bytes) -> None:
    """Say what ``cpuid`` tells; raises ``ValueError`` where KVM does not take it."""
    head = struct.pack("<II", len(entries) // sizeof(abi.CpuidEntry), 0)
    _set(vcpu, abi.SET_CPUID2, bytearray(head + entries), "cpuid")
