"""The model-specific registers of a vCPU: which of them travel, and how they are read and set."""

from __future__ import annotations

import fcntl
import struct
from collections.abc import Iterable, Mapping
from ctypes import sizeof
from typing import Final

from . import abi
from .abi import MsrEntry

TSC: Final = 0x10
EFER: Final = 0xC0000080

NAMES: Final = {
    "star": 0xC0000081,
    "lstar": 0xC0000082,
    "cstar": 0xC0000083,
    "sfmask": 0xC0000084,
    "kernel_gs_base": 0xC0000102,
    "sysenter_cs": 0x174,
    "sysenter_esp": 0x175,
    "sysenter_eip": 0x176,
    "pat": 0x277,
    "tsc": TSC,
    "tsc_aux": 0xC0000103,
}
"""The numbers of :class:`~vmferry.machines.cpu_state.Msrs`."""

_MTRRS: Final = (
    *range(0x200, 0x210),
    *(0x250, 0x258, 0x259),
    *range(0x268, 0x270),
    0x2FF,
)
"""The memory type ranges, which KVM has and does not list."""

_NOT_STATE: Final = (
    range(0x11, 0x13),  # clocks of KVM, as those behind 4b564d00; cpuid offers none of them
    range(0x4B564D00, 0x4B564E00),
    range(0x40000000, 0x40000200),  # of Hyper-V, likewise
    range(0x34, 0x35),  # how many SMIs there were
    range(0x8B, 0x8C),  # the revision of this host's microcode
    range(0x9E, 0x9F),  # the base of SMM, which is never entered
    range(0xCE, 0xCF),  # what the processor is, as cpuid is: this one and those that follow
    range(0x10A, 0x10B),
    range(0x345, 0x346),
    range(0x480, 0x4A0),
    range(0x6E0, 0x6E1),  # the deadline of a local APIC that is not there
)
"""Listed by KVM, and nothing that the guest changed here."""


def travelling(vcpu: int, listed: Iterable[int]) -> list[int]:
    """The registers that travel: of those that KVM *listed*, and takes as it gives them."""
    wanted = {*listed, *NAMES.values(), *_MTRRS}
    wanted = {index for index in wanted if not any(index in part for part in _NOT_STATE)}
    # Setting the time stamp counter at all has KVM take a later value for an attempt to keep the
    # vCPUs together, if the two are less than a second apart.
    return [index for index in sorted(wanted) if index == TSC or _takes_back(vcpu, index)]


def _takes_back(vcpu: int, index: int) -> bool:
    buffer, _ = _argument([(index, 0)])
    requests = (abi.GET_MSRS, abi.SET_MSRS)
    return all(fcntl.ioctl(vcpu, request, buffer) == 1 for request in requests)


def read(vcpu: int, indices: Iterable[int]) -> dict[int, int]:
    """What the registers *indices* are, up to the first that KVM does not know."""
    buffer, entries = _argument((index, 0) for index in indices)
    count = fcntl.ioctl(vcpu, abi.GET_MSRS, buffer)
    return {entry.index: entry.data for entry in entries[:count]}


def write(vcpu: int, values: Mapping[int, int]) -> None:
    """Set registers; raises ``ValueError`` with the first that KVM does not take."""
    buffer, entries = _argument(values.items())
    count = fcntl.ioctl(vcpu, abi.SET_MSRS, buffer)
    if count < len(entries):
        refused = entries[count]
        what = f"{refused.data:#x} for {name(refused.index)}"
        raise ValueError(f"msrs: this host does not take {what}")


def name(index: int) -> str:
    """The usual name of a register, or its number."""
    names = {number: name for name, number in NAMES.items()} | {EFER: "efer"}
    return names.get(index, f"{index:#x}")


def _argument(values: Iterable[tuple[int, int]]) -> tuple[bytearray, list[MsrEntry]]:
    pairs = list(values)
    buffer = bytearray(8 + len(pairs) * sizeof(MsrEntry))
    struct.pack_into("<I", buffer, 0, len(pairs))
    entries = list((MsrEntry * len(pairs)).from_buffer(buffer, 8))
    for entry, (index, value) in zip(entries, pairs, strict=True):
        entry.index, entry.data = index, value
    return buffer, entries
