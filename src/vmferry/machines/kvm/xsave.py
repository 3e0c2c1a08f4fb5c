"""The XSAVE area of KVM: what is x87 and SSE in it, and its other components.

AMD64 Architecture Programmer's Manual, volume 2, 11.5 and volume 5, ``FXSAVE``; the standard
format, in which each component stands where ``cpuid`` (leaf 0xD) says.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from vmferry.machines.cpu_state import Fpu
from vmferry.machines.cpu_subsections import Component, Cpuid, Xsave

from .cpuid import XSAVE, by_number

_LEGACY: Final = struct.Struct("<HHBxHQQII128s256s")
_LEGACY_BITS: Final = 3  # x87 and SSE
_BITS_AT: Final = 512
_SUPERVISOR: Final = 1


@dataclass(frozen=True, slots=True)
class Places:
    """Where this host has the components: by number, offset and size; and what XCR0 may be."""

    xcr0: int
    components: dict[int, tuple[int, int]]

    @classmethod
    def of(cls, cpuid: Cpuid, size: int) -> Places:
        """The places that ``cpuid`` tells of, in an area of *size* bytes."""
        leaves = by_number(cpuid)
        main = leaves.get((XSAVE, 0))
        return cls(
            main.eax | main.edx << 32 if main is not None else 1,
            {
                index: (leaf.ebx, leaf.eax)
                for (function, index), leaf in leaves.items()
                if function == XSAVE
                and index >= 2
                and not leaf.ecx & _SUPERVISOR
                and leaf.ebx + leaf.eax <= size
            },
        )

    def check(self, xsave: Xsave) -> None:
        """Raise ``ValueError`` for what this host does not have, or not at that place."""
        if beyond := xsave.xcr0 & ~self.xcr0:
            raise ValueError(
                f"xsave.xcr0: the guest uses {beyond:#x}, and this host has {self.xcr0:#x} only"
            )
        for component in xsave.components:
            found = self.components.get(component.number)
            if found != (component.offset, component.size):
                raise ValueError(
                    f"xsave.components: the guest has component {component.number} at "
                    f"{component.offset} with {component.size} bytes, this host "
                    + (f"at {found[0]} with {found[1]}" if found else "has none")
                )


def split(area: bytearray, xcr0: int, places: Places) -> tuple[Fpu, Xsave | None]:
    """An area as KVM filled it; ``None`` where there is nothing but x87 and SSE."""
    control, status, tags, opcode, instruction, operand, mxcsr, _, registers, xmm = (
        _LEGACY.unpack_from(area)
    )
    fpu = Fpu(control, status, tags, opcode, instruction, operand, mxcsr, registers, xmm)
    (bits,) = struct.unpack_from("<Q", area, _BITS_AT)
    components = [
        Component(number, offset, size, bytes(area[offset : offset + size]))
        for number, (offset, size) in sorted(places.components.items())
        if bits >> number & 1 and any(area[offset : offset + size])
    ]
    if xcr0 == 1 and not components:
        return fpu, None
    return fpu, Xsave(xcr0, len(components), components)


def join(fpu: Fpu, xsave: Xsave | None, size: int) -> bytearray:
    """The area of *size* bytes for KVM; what is not there is as after a reset."""
    area = bytearray(size)
    _LEGACY.pack_into(
        area,
        0,
        fpu.control,
        fpu.status,
        fpu.tags,
        fpu.opcode,
        fpu.instruction,
        fpu.operand,
        fpu.mxcsr,
        0,
        fpu.registers,
        fpu.xmm,
    )
    bits = _LEGACY_BITS
    for component in xsave.components if xsave is not None else ():
        bits |= 1 << component.number
        area[component.offset : component.offset + component.size] = component.data
    struct.pack_into("<Q", area, _BITS_AT, bits)
    return area
