"""A vCPU's state in the registers of a Unicorn engine.

The engine shows no hidden part of the segments that 64-bit code does not use, so there is none:
what it holds is a guest in 64-bit mode with flat segments, and no other state is taken.  Its time
stamp counter is the host's, and is not set; what the guest was told by ``cpuid`` is kept for the
next host and has no meaning here.
"""

from __future__ import annotations

from typing import Any, Final

from unicorn import x86_const as x86

from vmferry.machines.cpu_state import CpuState, Fpu, Segment, Table

_GENERAL: Final = [
    getattr(x86, f"UC_X86_REG_{name}")
    for name in ("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI")
] + [getattr(x86, f"UC_X86_REG_R{number}") for number in range(8, 16)]
_XMM: Final = [getattr(x86, f"UC_X86_REG_XMM{number}") for number in range(16)]
_ST: Final = [getattr(x86, f"UC_X86_REG_FP{number}") for number in range(8)]
_DEBUG: Final = [getattr(x86, f"UC_X86_REG_DR{number}") for number in (0, 1, 2, 3, 6, 7)]
_CONTROL: Final = {name: getattr(x86, f"UC_X86_REG_{name.upper()}") for name in ("cr2", "cr8")}
_SELECTORS: Final = {
    name: getattr(x86, f"UC_X86_REG_{name.upper()}")
    for name in ("cs", "ds", "es", "ss", "fs", "gs")
}
_BASES: Final = {"fs": x86.UC_X86_REG_FS_BASE, "gs": x86.UC_X86_REG_GS_BASE}
_SYSTEM: Final = {"ldtr": x86.UC_X86_REG_LDTR, "tr": x86.UC_X86_REG_TR}
_TABLES: Final = {"gdt": x86.UC_X86_REG_GDTR, "idt": x86.UC_X86_REG_IDTR}

_EFER: Final = 0xC0000080
_MSRS: Final = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "sfmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "pat": 0x277,
    "tsc_aux": 0xC0000103,
}
_CODE: Final = 0xA09B
_DATA: Final = 0xC093  # both for ring 0
_LONG: Final = 0x2000
_LONG_MODE_ACTIVE: Final = 0x400
_FLAT: Final = 0xFFFFFFFF


def read_registers(engine: Any, state: CpuState) -> None:
    """Fill *state* with what the engine holds."""
    get = engine.reg_read
    state.registers = [get(register) for register in _GENERAL]
    state.rip, state.rflags = get(x86.UC_X86_REG_RIP), get(x86.UC_X86_REG_RFLAGS)
    for name, register in _SELECTORS.items():
        base = get(_BASES[name]) if name in _BASES else 0
        setattr(state, name, _segment(name, get(register), base))
    for name, register in _SYSTEM.items():
        selector, base, limit, flags = get(register)
        attributes = flags >> 8 & 0xF0FF
        setattr(state, name, Segment(selector, base, limit, attributes))
    for name, register in _TABLES.items():
        _, base, limit, _ = get(register)
        setattr(state, name, Table(base, limit))
    state.cr0, state.cr3 = get(x86.UC_X86_REG_CR0), get(x86.UC_X86_REG_CR3)
    state.cr4, state.efer = get(x86.UC_X86_REG_CR4), engine.msr_read(_EFER)
    for name, register in _CONTROL.items():
        setattr(state, name, get(register))
    state.debug = [get(register) for register in _DEBUG]
    for name, number in _MSRS.items():
        setattr(state.msrs, name, engine.msr_read(number))
    state.fpu = _read_fpu(engine)


def write_registers(engine: Any, state: CpuState) -> None:
    """Make the engine hold *state*; raises ``ValueError`` for what is not flat 64-bit mode."""
    _check(state)
    put = engine.reg_write
    put(x86.UC_X86_REG_CR3, state.cr3)
    put(x86.UC_X86_REG_CR4, state.cr4)
    engine.msr_write(_EFER, state.efer)
    put(x86.UC_X86_REG_CR0, state.cr0)
    for name, register in _TABLES.items():
        table = getattr(state, name)
        put(register, (0, table.base, table.limit, 0))
    for name, register in _SELECTORS.items():
        put(register, getattr(state, name).selector)
    for name, register in _BASES.items():
        put(register, getattr(state, name).base)
    for name, register in _SYSTEM.items():
        segment = getattr(state, name)
        flags = segment.attributes << 8
        put(register, (segment.selector, segment.base, segment.limit, flags))
    for name, register in _CONTROL.items():
        put(register, getattr(state, name))
    for register, value in zip(_DEBUG, state.debug, strict=True):
        put(register, value)
    for name, number in _MSRS.items():
        engine.msr_write(number, getattr(state.msrs, name))
    _write_fpu(engine, state.fpu)
    for register, value in zip(_GENERAL, state.registers, strict=True):
        put(register, value)
    put(x86.UC_X86_REG_RFLAGS, state.rflags)
    put(x86.UC_X86_REG_RIP, state.rip)
    engine.ctl_flush_tb()


def _check(state: CpuState) -> None:
    if not (state.efer & _LONG_MODE_ACTIVE and state.cs.attributes & _LONG):
        raise ValueError("efer and cs: Unicorn takes 64-bit mode, and nothing else")
    for name in ("cs", "ds", "es", "ss"):
        if getattr(state, name).base:
            raise ValueError(f"{name}: Unicorn takes a base of 0, and nothing else")
    for name in ("xsave", "other_msrs", "events"):
        if getattr(state, name) is not None:
            raise ValueError(f"{name}: the guest uses what Unicorn does not have")


def _segment(name: str, selector: int, base: int) -> Segment:
    if not selector & ~3:
        return Segment(selector, base, 0, 0)
    attributes = (_CODE if name == "cs" else _DATA) | (selector & 3) << 5
    return Segment(selector, base, _FLAT, attributes)


def _read_fpu(engine: Any) -> Fpu:
    get = engine.reg_read
    status, tags = get(x86.UC_X86_REG_FPSW), get(x86.UC_X86_REG_FPTAG)
    top = status >> 11 & 7
    stack = b""
    for number in range(8):
        mantissa, exponent = get(_ST[(top + number) & 7])
        stack += mantissa.to_bytes(8, "little") + exponent.to_bytes(8, "little")
    return Fpu(
        control=get(x86.UC_X86_REG_FPCW),
        status=status,
        tags=sum(1 << number for number in range(8) if tags >> (2 * number) & 3 != 3),
        opcode=get(x86.UC_X86_REG_FOP),
        instruction=get(x86.UC_X86_REG_FIP),
        operand=get(x86.UC_X86_REG_FDP),
        mxcsr=get(x86.UC_X86_REG_MXCSR),
        registers=stack,
        xmm=b"".join(get(register).to_bytes(16, "little") for register in _XMM),
    )


def _write_fpu(engine: Any, fpu: Fpu) -> None:
    put = engine.reg_write
    put(x86.UC_X86_REG_FPCW, fpu.control)
    put(x86.UC_X86_REG_FPSW, fpu.status)
    put(x86.UC_X86_REG_FPTAG, sum(3 << (2 * n) for n in range(8) if not fpu.tags >> n & 1))
    put(x86.UC_X86_REG_FOP, fpu.opcode)
    put(x86.UC_X86_REG_FIP, fpu.instruction)
    put(x86.UC_X86_REG_FDP, fpu.operand)
    put(x86.UC_X86_REG_MXCSR, fpu.mxcsr)
    top = fpu.status >> 11 & 7
    for number in range(8):
        raw = fpu.registers[16 * number : 16 * number + 10]
        value = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
        put(_ST[(top + number) & 7], value)
    for number, register in enumerate(_XMM):
        put(register, int.from_bytes(fpu.xmm[16 * number : 16 * number + 16], "little"))
