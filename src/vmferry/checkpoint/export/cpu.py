"""The registers of x86 CPUs, from their state in the stream.

QEMU 7.2 ``target/i386/machine.c`` (the state), ``target/i386/cpu.h`` (the order of registers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vmferry.errors import UsageError
from vmferry.vmstate.tree import Array, DeviceState, Value

from .devices import Devices, unreadable

_CPU: Final = "cpu"
_COUNTS: Final = (8, 16)
"""General registers in the state: 8 where the QEMU was one for 32-bit guests only."""

SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs")
"""The order of ``env.segs``."""

_TABLES: Final = ("ldt", "tr", "gdt", "idt")
_IN_LONG_MODE: Final = 1 << 14
"""The bit of ``env.hflags`` that follows EFER.LMA."""


@dataclass(frozen=True, slots=True)
class SegmentRegister:
    """A segment register with what the CPU keeps of its descriptor."""

    selector: int
    base: int
    limit: int
    flags: int


@dataclass(frozen=True, slots=True)
class Registers:
    """One CPU.

    ``general`` has 16 registers in the order in which instructions number them: rax, rcx, rdx, rbx,
    rsp, rbp, rsi, rdi, r8 to r15.  ``segments`` are by name, ``ldt``, ``tr``, ``gdt`` and ``idt``
    among them.  ``cr`` are cr0 to cr4; there is no cr1, it is 0.
    """

    index: int
    general: tuple[int, ...]
    rip: int
    rflags: int
    segments: dict[str, SegmentRegister]
    cr: tuple[int, int, int, int, int]
    kernel_gs_base: int
    long_mode: bool


def read_cpus(devices: Devices) -> list[Registers]:
    """The registers of all CPUs, by index; raises :class:`StreamError` where one cannot be read."""
    states = devices.states(_CPU)
    if not states:
        raise UsageError("no CPU is among the devices of this machine; the CPUs cannot be exported")
    return [_read(state) for state in states]


def _read(state: DeviceState) -> Registers:
    general = state.get("env.regs")
    if (
        not isinstance(general, Array)
        or len(general.values) not in _COUNTS
        or min(general.values) < 0
    ):
        raise unreadable(_CPU, "the general registers, env.regs", general)
    segments = {
        name: _segment(state, f"env.segs[{index}]") for index, name in enumerate(SEGMENTS)
    } | {name: _segment(state, f"env.{name}") for name in _TABLES}
    cr0, cr2, cr3, cr4 = (_number(state, f"env.cr[{index}]") for index in (0, 2, 3, 4))
    has_64_bits = len(general.values) == max(_COUNTS)
    return Registers(
        index=state.instance,
        general=tuple(general.values) + (0,) * (max(_COUNTS) - len(general.values)),
        rip=_number(state, "env.eip"),
        rflags=_number(state, "env.eflags"),
        segments=segments,
        cr=(cr0, 0, cr2, cr3, cr4),
        kernel_gs_base=_number(state, "env.kernelgsbase") if has_64_bits else 0,
        long_mode=bool(_number(state, "env.hflags") & _IN_LONG_MODE),
    )


def _segment(state: DeviceState, path: str) -> SegmentRegister:
    return SegmentRegister(
        selector=_number(state, f"{path}.selector", 32),
        base=_number(state, f"{path}.base"),
        limit=_number(state, f"{path}.limit", 32),
        flags=_number(state, f"{path}.flags", 32),
    )


def _number(state: DeviceState, path: str, bits: int = 64) -> int:
    node = state.get(path)
    if not isinstance(node, Value) or node.value is None or not 0 <= node.value < 1 << bits:
        raise unreadable(_CPU, f"{path}, a number of at most {bits} bits", node)
    return int(node.value)
