"""A VM of KVM: memory slots and vCPUs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import MachineError, UsageError
from vmferry.machines.cpu import Bus

from . import abi
from .abi import Capability, MemoryRegion
from .cpuid import guest_cpuid
from .system import Kvm
from .vcpu import KvmVcpu

_TSS: Final = 0xFFFBD000
"""Three pages below 4 GiB that Intel's processors may need; the board has nothing there."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A range of guest-physical memory: *size* bytes from *start*, at *address* in this process."""

    number: int
    start: int
    address: int
    size: int
    read_only: bool


class KvmHost:
    """Makes vCPUs that reach *bus* (:class:`~vmferry.machines.cpu.CpuHost`).

    Raises :class:`~vmferry.errors.MachineError` where KVM cannot be used.
    """

    def __init__(self, bus: Bus, *, device: str = "/dev/kvm") -> None:
        self._bus = bus
        self._slots: list[Slot] = []
        self._vcpus: list[KvmVcpu] = []
        self._logging: set[Slot] = set()
        with ExitStack() as cleanup:
            kvm = self._kvm = Kvm(device)
            cleanup.callback(kvm.close)
            self._vm = kvm.create_vm()
            cleanup.callback(os.close, self._vm)
            _set_tss(self._vm)
            self._area = max(self._ask(Capability.XSAVE2), abi.XSAVE_SIZE)
            self._supported = kvm.supported_cpuid()
            self._listed = kvm.msr_indices()
            self._cleanup = cleanup.pop_all()

    # Memory

    def map(self, start: int, address: int, size: int, *, read_only: bool = False) -> None:
        """As :meth:`~vmferry.machines.cpu.CpuHost.map`, also while vCPUs run.

        What the guest writes to *read_only* memory goes to the bus instead.
        """
        slot = Slot(len(self._slots), start, address, size, read_only)
        if len(self._slots) == self._kvm.extension(Capability.NR_MEMSLOTS):
            raise MachineError(f"KVM takes {len(self._slots)} ranges of memory and no more")
        if read_only and not self._kvm.extension(Capability.READONLY_MEM):
            raise MachineError("this kernel has no read-only memory for guests")
        self._set_slot(slot, log=False)
        self._slots.append(slot)

    def dirty_slots(self) -> KvmHost:
        """As :meth:`~vmferry.machines.cpu.CpuHost.dirty_slots`."""
        return self

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The memory of the VM."""
        return tuple(self._slots)

    def log(self, slot: Slot, *, on: bool) -> None:
        """Note what vCPUs write to the slot, from now on; or no more."""
        if on != (slot in self._logging):
            self._set_slot(slot, log=on)
            (self._logging.add if on else self._logging.discard)(slot)

    def collect(self, slot: Slot) -> npt.NDArray[np.uint64]:
        """The pages that vCPUs wrote since the log was turned on, or since the last call.

        Bit ``i % 64`` of word ``i // 64`` is page *i* of the slot.  Each write is in this bitmap
        or in the next.  Writes by this process itself are in none.
        """
        if slot not in self._logging:
            raise UsageError(f"what is written to the slot {slot.number} is not logged")
        words = np.zeros(-(-slot.size // (4096 * 64)), np.uint64)
        argument = abi.DirtyLog(slot.number, 0, words.ctypes.data)
        fcntl.ioctl(self._vm, abi.GET_DIRTY_LOG, argument)
        return words

    def _set_slot(self, slot: Slot, *, log: bool) -> None:
        flags = abi.MEMORY_LOG if log else 0
        flags |= abi.MEMORY_READ_ONLY if slot.read_only else 0
        region = MemoryRegion(slot.number, flags, slot.start, slot.size, slot.address)
        try:
            fcntl.ioctl(self._vm, abi.SET_USER_MEMORY_REGION, region)
        except OSError as error:
            overlaps = error.errno == errno.EEXIST
            what = "it overlaps with other memory" if overlaps else error.strerror
            raise MachineError(
                f"KVM does not take {slot.size:#x} bytes of memory at {slot.start:#x}: {what}"
            ) from error

    # vCPUs

    def add_vcpu(self) -> KvmVcpu:
        """As :meth:`~vmferry.machines.cpu.CpuHost.add_vcpu`."""
        number = len(self._vcpus)
        if number == (most := self._ask(Capability.MAX_VCPUS)):
            raise MachineError(f"KVM runs {most} vCPUs and no more")
        try:
            fd = fcntl.ioctl(self._vm, abi.CREATE_VCPU, number)
        except OSError as error:
            raise MachineError(f"KVM makes no vCPU {number}: {error.strerror}") from error
        try:
            vcpu = KvmVcpu(
                fd,
                number,
                self._bus,
                run_size=self._kvm.run_size,
                area=self._area,
                cpuid=guest_cpuid(self._supported, number),
                listed_msrs=self._listed,
            )
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """Give everything back; again is harmless."""
        for vcpu in self._vcpus:
            vcpu.close()
        self._vcpus.clear()
        self._cleanup.close()

    def _ask(self, capability: Capability) -> int:
        """What this VM says to a capability, which may be another than KVM says."""
        return fcntl.ioctl(self._vm, abi.CHECK_EXTENSION, int(capability))


def _set_tss(vm: int) -> None:
    # By way of ctypes, as fcntl.ioctl takes no number above 2**31 - 1.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(vm, ctypes.c_ulong(abi.SET_TSS_ADDR), ctypes.c_ulong(_TSS)) < 0:
        number = ctypes.get_errno()
        raise MachineError(f"KVM does not take the address of its TSS: {os.strerror(number)}")
