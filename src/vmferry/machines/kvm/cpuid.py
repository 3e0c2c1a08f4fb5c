"""What a guest is told of its processor, and whether this host keeps what another promised.

The numbers are those of the AMD64 Architecture Programmer's Manual, volume 3, appendix E, and of
Intel's Software Developer's Manual, volume 2, ``CPUID``.
"""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import sizeof
from typing import Final

from vmferry.machines.cpu_subsections import Cpuid, Leaf

from .abi import CPUID_INDEXED, CpuidEntry

XSAVE: Final = 0xD

_FEATURES: Final = {
    (1, 0): ("ecx", "edx"),
    (7, 0): ("ebx", "ecx", "edx"),
    (7, 1): ("eax", "ebx", "ecx", "edx"),
    (7, 2): ("edx",),
    (XSAVE, 0): ("eax", "edx"),
    (XSAVE, 1): ("eax", "ecx", "edx"),
    (0x14, 0): ("ebx", "ecx"),
    (0x19, 0): ("ebx",),
    (0x80000001, 0): ("ecx", "edx"),
    (0x80000007, 0): ("ebx", "edx"),
    (0x80000008, 0): ("ebx",),
    (0x8000000A, 0): ("edx",),
    (0x80000021, 0): ("eax",),
}
"""Registers of which each bit is a promise that instructions or registers are there."""

_UNFULFILLED: Final = {
    # There is no local APIC, so neither x2APIC (21) nor its TSC deadline (24); and nothing that a
    # hypervisor tells its guests (31).
    (1, 0, "ecx"): 1 << 21 | 1 << 24 | 1 << 31,
    (1, 0, "edx"): 1 << 9,
    # The TSC's frequency may change where the machine moves to.
    (0x80000007, 0, "edx"): 1 << 8,
}
"""Bits that KVM supports and this machine does not."""

_HYPERVISOR: Final = range(0x40000000, 0x40010000)
"""Leaves of KVM itself: what a guest turns on there would have to move with it."""

_CHANGING: Final = {
    # KVM itself keeps these as the guest's control registers are (OSXSAVE, APIC, OSPKE).
    (1, 0, "ecx"): 1 << 27,
    (1, 0, "edx"): 1 << 9,
    (7, 0, "ecx"): 1 << 4,
}


def guest_cpuid(supported: bytes, number: int) -> Cpuid:
    """What the vCPU *number* is told: all that KVM and this machine can keep."""
    leaves = [leaf for leaf in unpack(supported).leaves if leaf.function not in _HYPERVISOR]
    for (function, index, register), bits in _UNFULFILLED.items():
        for leaf in leaves:
            if (leaf.function, leaf.index) == (function, index):
                setattr(leaf, register, getattr(leaf, register) & ~bits)
    for leaf in leaves:
        _name(leaf, number)
    return Cpuid(len(leaves), leaves)


def check_cpuid(wanted: Cpuid, ours: Cpuid) -> None:
    """Raise ``ValueError`` with every feature that *wanted* promises and *ours* has not."""
    have = by_number(ours)
    missing = []
    for (function, index), leaf in by_number(wanted).items():
        own = have.get((function, index), Leaf())
        for register in _FEATURES.get((function, index), ()):
            bits = getattr(leaf, register) & ~getattr(own, register)
            bits &= ~_CHANGING.get((function, index, register), 0)
            missing += [
                f"{function:#x}.{index}.{register}[{bit}]" for bit in range(32) if bits >> bit & 1
            ]
    if missing:
        raise ValueError(
            f"cpuid: the guest was promised features that this host has not: {', '.join(missing)}"
        )


def pack(cpuid: Cpuid) -> bytes:
    """The leaves as KVM takes them: entries one behind the other."""
    return b"".join(
        bytes(
            CpuidEntry(
                leaf.function,
                leaf.index,
                CPUID_INDEXED if leaf.indexed else 0,
                leaf.eax,
                leaf.ebx,
                leaf.ecx,
                leaf.edx,
            )
        )
        for leaf in cpuid.leaves
    )


def unpack(data: bytes) -> Cpuid:
    """The leaves of entries as KVM gives them."""
    count = len(data) // sizeof(CpuidEntry)
    entries = (CpuidEntry * count).from_buffer_copy(data)
    return Cpuid(count, [_leaf(entry) for entry in entries])


def by_number(cpuid: Cpuid) -> Mapping[tuple[int, int], Leaf]:
    """The leaves by function and index."""
    return {(leaf.function, leaf.index): leaf for leaf in cpuid.leaves}


def _leaf(entry: CpuidEntry) -> Leaf:
    return Leaf(
        entry.function,
        entry.index,
        entry.flags & CPUID_INDEXED,
        entry.eax,
        entry.ebx,
        entry.ecx,
        entry.edx,
    )


def _name(leaf: Leaf, number: int) -> None:
    """Make the vCPU's number its APIC id."""
    match leaf.function:
        case 1:
            leaf.ebx = leaf.ebx & 0x00FF_FFFF | number << 24
        case 0xB | 0x1F:
            leaf.edx = number
        case 0x8000001E:
            leaf.eax = number
