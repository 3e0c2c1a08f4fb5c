"""All that a vCPU of KVM holds travels, and what must not be loaded is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmferry.errors import StateError
from vmferry.machines.cpu_state import RAX, RCX, CpuState, Segment
from vmferry.machines.cpu_subsections import Component, Cpuid, Events, Leaf, Msr, OtherMsrs, Xsave
from vmferry.machines.listing import assemble
from vmferry.vmstate import load, save

from .hosted import NO_KVM
from .small import CODE, DATA, Running, Small, small, wait_until

LIMIT = DATA + 8
SUMS = DATA + 0x1000

# Registers, x87, SSE, AVX and memory all depend on each other and on every round of the loop, whose
# number is compared with a word of memory.
MIXED = assemble(
    """
    48 b8 15 7c 4a 7f b9 79 37 9e ; mov rax, 0x9e3779b97f4a7c15
    bb {DATA.d}                   ; mov ebx, DATA
    31 c9                         ; xor ecx, ecx
    31 f6                         ; xor esi, esi
    d9 eb                         ; fldpi
    d9 e8                         ; fld1
    66 48 0f 6e c0                ; movq xmm0, rax
    c4 e2 7d 59 c8                ; vpbroadcastq ymm1, xmm0
    0f ae 13                      ; ldmxcsr [rbx]
loop:
    48 0f af c0                   ; imul rax, rax
    48 83 c0 35                   ; add rax, 0x35
    c5 f5 d4 c9                   ; vpaddq ymm1, ymm1, ymm1
    66 48 0f 6e d0                ; movq xmm2, rax
    c4 e2 7d 59 d2                ; vpbroadcastq ymm2, xmm2
    c5 f5 ef ca                   ; vpxor ymm1, ymm1, ymm2
    d8 c1                         ; fadd st0, st1
    48 8b d6                      ; mov rdx, rsi
    81 e2 f8 0f 00 00             ; and edx, 0xff8
    48 01 84 13 00 10 00 00       ; add [rbx+rdx+0x1000], rax
    48 83 c6 08                   ; add rsi, 8
    48 ff c1                      ; inc rcx
    48 3b 4b 08                   ; cmp rcx, [rbx+8]
    75 {loop.r}                   ; jne loop
    e6 80                         ; out 0x80, al
    eb fe                         ; jmp to itself
    """,
    origin=CODE,
    parameters={"DATA": DATA},
).hex()


pytestmark = pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM)


def content(machine: Small) -> CpuState:
    """What a vCPU holds, but for the time."""
    state = machine.state()
    state.holder = None  # type: ignore[assignment]
    state.msrs.tsc = 0
    return state


def move(source: Small, destination: Small) -> None:
    destination.block.array[:] = source.block.array
    load(CpuState(destination.vcpu), save(CpuState(source.vcpu)), 1)


def to_end(machine: Small) -> None:
    machine.bus.noticed = machine.vcpu.kick
    while not machine.bus.accesses:
        machine.vcpu.run()


def test_a_guest_goes_on_as_if_it_had_not_been_moved() -> None:
    with small(MIXED, ring=3) as source, small() as destination:
        source.block.view[DATA : DATA + 4] = (0x1F00).to_bytes(4, "little")  # mxcsr
        with Running(source.vcpu) as running:
            wait_until(lambda: source.word(SUMS) or running.error)
        assert running.error is None
        move(source, destination)
        assert content(destination) == content(source)
        end = source.state().registers[RCX] + 1_000_000
        for machine in (source, destination):
            machine.block.view[LIMIT : LIMIT + 8] = end.to_bytes(8, "little")
            to_end(machine)
        assert content(destination) == content(source)
        assert destination.state().registers[RCX] == end
        assert (destination.block.array == source.block.array).all()
        moved = destination.state()
        assert moved.fpu.mxcsr == 0x1F00
        assert moved.xsave is not None
        assert [part.number for part in moved.xsave.components] == [2]


CHANGES: dict[str, Callable[[CpuState], object]] = {
    "general registers": lambda s: s.registers.__setitem__(slice(None), range(0x100, 0x110)),
    "flags": lambda s: setattr(s, "rflags", 0x10_3AD7),
    "debug registers": lambda s: setattr(s, "debug", [0x1000, 0x2000, 3, 4, 0xFFFF0FF1, 0x455]),
    "fs and gs": lambda s: (setattr(s.fs, "base", 0x1234567), setattr(s.gs, "base", 0x7654321)),
    "tables": lambda s: (setattr(s.gdt, "base", 0x5000), setattr(s.idt, "limit", 0x3FF)),
    "task": lambda s: setattr(s, "tr", Segment(0x28, 0x6000, 0x67, 0x8B)),
    "local descriptors": lambda s: setattr(s, "ldtr", Segment(0x30, 0x7000, 0x1F, 0x82)),
    "cr2": lambda s: setattr(s, "cr2", 0xDEAD000),
    "cr8": lambda s: setattr(s, "cr8", 5),
    "x87": lambda s: setattr(s.fpu, "registers", bytes(range(10)) + bytes(118)),
    "sse": lambda s: setattr(s.fpu, "xmm", bytes(range(256))),
    "system calls": lambda s: (
        setattr(s.msrs, "star", 0x0013_0008 << 32),
        setattr(s.msrs, "lstar", 0x50000),
        setattr(s.msrs, "sfmask", 0x200),
        setattr(s.msrs, "kernel_gs_base", 0x60000),
    ),
    "sysenter": lambda s: (
        setattr(s.msrs, "sysenter_cs", 8),
        setattr(s.msrs, "sysenter_esp", 0x7000),
        setattr(s.msrs, "sysenter_eip", 0x8000),
    ),
    "page attributes": lambda s: setattr(s.msrs, "pat", 0x0606060606060606),
    "avx": lambda s: setattr(
        s, "xsave", Xsave(7, 1, [Component(2, 576, 256, bytes(reversed(range(256))))])
    ),
    "xcr0 alone": lambda s: setattr(s, "xsave", Xsave(7)),
    "a memory type range": lambda s: setattr(s, "other_msrs", OtherMsrs(1, [Msr(0x2FF, 0xC06)])),
    "an exception under way": lambda s: setattr(
        s, "events", Events(exception_injected=1, exception_nr=13, exception_has_error_code=1)
    ),
    "interrupts held off": lambda s: setattr(s, "events", Events(interrupt_shadow=1)),
    "an nmi": lambda s: setattr(s, "events", Events(nmi_masked=1)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_set_is_there_and_arrives(what: str) -> None:
    with small() as source, small() as destination:
        before = content(source)
        wanted = source.state()
        CHANGES[what](wanted)
        source.vcpu.write(wanted)
        set_ = content(source)
        assert set_ != before
        wanted.holder, wanted.msrs.tsc = None, 0
        assert set_ == wanted
        move(source, destination)
        assert content(destination) == set_


def test_what_a_state_does_not_say_is_as_after_a_reset() -> None:
    with small() as machine:
        fresh = content(machine)
        for change in CHANGES.values():
            state = machine.state()
            change(state)
            machine.vcpu.write(state)
        assert content(machine) != fresh
        state = fresh
        state.holder = machine.vcpu
        machine.vcpu.write(state)
        assert content(machine) == (setattr(state, "holder", None), state)[1]


DAMAGE: dict[str, tuple[Callable[[CpuState], object], str]] = {
    "cr0": (lambda s: setattr(s, "cr0", 0x8000_0000_0000_0033), "the segments and cr0 to cr8"),
    "cr4": (lambda s: setattr(s, "cr4", 1 << 40), "the segments and cr0 to cr8"),
    "efer": (lambda s: setattr(s, "efer", 0x8000_0500), "0x80000500 for efer"),
    "xcr0 without x87": (lambda s: setattr(s, "xsave", Xsave(6)), r"xsave\.xcr0 = 0x6"),
    "xcr0 of the future": (lambda s: setattr(s, "xsave", Xsave(1 << 62 | 1)), r"xcr0: the guest"),
    "a component elsewhere": (
        lambda s: setattr(s, "xsave", Xsave(7, 1, [Component(2, 1024, 256, bytes(256))])),
        "component 2 at 1024 with 256 bytes, this host at 576 with 256",
    ),
    "a component that nobody has": (
        lambda s: setattr(s, "xsave", Xsave(7, 1, [Component(61, 576, 1, bytes(1))])),
        "component 61 at 576 with 1 bytes, this host has none",
    ),
    "mxcsr": (lambda s: setattr(s.fpu, "mxcsr", 0xFFFF_FFFF), "fpu and xsave"),
    "an address that is none": (lambda s: setattr(s.msrs, "lstar", 1 << 62), "for lstar"),
    "a memory type range": (
        lambda s: setattr(s, "other_msrs", OtherMsrs(1, [Msr(0x2FF, 0xC02)])),
        "0xc02 for 0x2ff",
    ),
    "an msr that nobody has": (
        lambda s: setattr(s, "other_msrs", OtherMsrs(1, [Msr(0xDEAD, 1)])),
        "uses 0xdead, and this host has it not",
    ),
    "an exception that is none": (
        lambda s: setattr(s, "events", Events(exception_injected=1, exception_nr=200)),
        "events",
    ),
    "dr7": (lambda s: s.debug.__setitem__(5, 1 << 40), "debug"),
    "a feature that nobody has": (
        lambda s: setattr(s, "cpuid", Cpuid(1, [Leaf(0x80000021, 0, 0, eax=1 << 31)])),
        r"has not: 0x80000021\.0\.eax\[31\]",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_and_changes_nothing(what: str) -> None:
    change, message = DAMAGE[what]
    with small(MIXED, ring=3) as source, small("f4") as destination:
        move(source, destination)
        destination.put("f4")
        before = content(destination)
        state = source.state()
        state.registers[RAX] = 0xBAD
        change(state)
        with pytest.raises(ValueError, match=message):
            destination.vcpu.write(state)
        assert content(destination) == before


def test_a_refused_state_says_so_when_it_is_loaded() -> None:
    with small() as source, small() as destination:
        state = CpuState(source.vcpu)
        before = content(destination)
        data = save(state)
        at = data.index((0x80010033).to_bytes(8, "big"))
        damaged = data[:at] + (1 << 63).to_bytes(8, "big") + data[at + 8 :]
        with pytest.raises(StateError, match=r"cpu: .* found the segments and cr0 to cr8"):
            load(CpuState(destination.vcpu), damaged, 1)
        assert content(destination) == before


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_bytes_that_were_changed_are_refused_or_held(data: st.DataObject) -> None:
    with small(MIXED, ring=3) as source, small() as destination:
        state = source.state()
        CHANGES["avx"](state)
        CHANGES["a memory type range"](state)
        source.vcpu.write(state)
        damaged = bytearray(save(CpuState(source.vcpu)))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] ^= 1 << data.draw(st.integers(0, 7))
        before = content(destination)
        try:
            load(CpuState(destination.vcpu), damaged, 1)
        except StateError:
            assert content(destination) == before
        else:
            held = content(destination)
            held.holder = destination.vcpu
            destination.vcpu.write(held)


def test_what_unicorn_does_not_have_does_not_move_there() -> None:
    unicorn = pytest.importorskip("vmferry.machines.unicorn", reason="Unicorn is not installed")
    with small() as machine:
        vcpu = unicorn.UnicornHost(machine.bus).add_vcpu()
        state = machine.state()
        vcpu.write(state)
        for what in ("avx", "a memory type range", "an nmi"):
            state = machine.state()
            CHANGES[what](state)
            with pytest.raises(ValueError, match="the guest uses what Unicorn does not have"):
                vcpu.write(state)


def test_a_vcpu_that_has_run_keeps_its_cpuid() -> None:
    with small("f4") as machine:
        machine.until_halt()
        state = machine.state()
        assert state.cpuid is not None
        machine.vcpu.write(state)
        state.cpuid = Cpuid(state.cpuid.count - 1, state.cpuid.leaves[:-1])
        with pytest.raises(ValueError, match="cpuid: a vCPU that has run keeps"):
            machine.vcpu.write(state)


def test_the_guest_is_told_what_came() -> None:
    # mov eax, 0x80000002; cpuid; hlt: the name of the processor
    with small("b8 02 00 00 80 0f a2 f4") as source, small() as destination:
        state = source.state()
        assert state.cpuid is not None
        for leaf in state.cpuid.leaves:
            if leaf.function == 0x80000002:
                leaf.eax = 0x41424344
        source.vcpu.write(state)
        move(source, destination)
        destination.until_halt()
        assert destination.state().registers[RAX] == 0x41424344


def test_the_guest_is_told_of_nothing_that_would_not_move_with_it() -> None:
    # eax = 0x40000000: no leaves of the hypervisor; then 1: neither x2apic, deadline nor apic
    with small("b8 00 00 00 40 0f a2 93 b8 01 00 00 00 0f a2 f4") as machine:
        state = machine.state()
        leaves = {(leaf.function, leaf.index): leaf for leaf in state.cpuid.leaves}
        assert not [number for number, _ in leaves if 0x40000000 <= number < 0x40010000]
        assert not leaves[1, 0].ecx & (1 << 31 | 1 << 24 | 1 << 21)
        assert not leaves[1, 0].edx & 1 << 9


def test_the_time_stamp_counter_goes_on_where_it_was_saved() -> None:
    # rdtsc; shl rdx, 32; or rax, rdx; hlt
    with small("0f 31 48 c1 e2 20 48 09 d0 f4") as source, small() as destination:
        start = 1 << 50
        state = source.state()
        state.msrs.tsc = start
        source.vcpu.write(state)
        assert source.state().msrs.tsc == start
        source.until_halt()
        saved = source.state().msrs.tsc
        if saved < start:
            pytest.skip("this KVM does not offset the time stamp counter: guests see the host's")
        assert start <= source.state().registers[RAX] <= saved
        move(source, destination)
        moved = destination.state()
        assert saved < moved.msrs.tsc < saved + (1 << 36)
        # The time until it runs again is not counted.
        assert destination.state().msrs.tsc == moved.msrs.tsc
        moved.rip = CODE
        destination.vcpu.write(moved)
        destination.until_halt()
        assert destination.state().registers[RAX] >= moved.msrs.tsc
