"""The numbers and layouts of ``/dev/kvm``, as in ``linux/kvm.h`` and x86's ``asm/kvm.h``.

Everything is x86-64, and little-endian as the processor.  The kernel's own description is
``Documentation/virt/kvm/api.rst``.
"""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from enum import IntEnum
from typing import Final

API_VERSION: Final = 12


class Segment(Structure):
    """``struct kvm_segment``."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class Table(Structure):
    """``struct kvm_dtable``."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Regs(Structure):
    """``struct kvm_regs``; the order is not that of the encoding."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    )


class Sregs(Structure):
    """``struct kvm_sregs``; the bitmap is of interrupts that await injection."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Table),
        ("idt", Table),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class DebugRegs(Structure):
    """``struct kvm_debugregs``."""

    _fields_ = (
        ("db", c_uint64 * 4),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
        ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    )


class Events(Structure):
    """``struct kvm_vcpu_events``, its parts spread out."""

    _fields_ = (
        ("exception_injected", c_uint8),
        ("exception_nr", c_uint8),
        ("exception_has_error_code", c_uint8),
        ("exception_pending", c_uint8),
        ("exception_error_code", c_uint32),
        ("interrupt_injected", c_uint8),
        ("interrupt_nr", c_uint8),
        ("interrupt_soft", c_uint8),
        ("interrupt_shadow", c_uint8),
        ("nmi_injected", c_uint8),
        ("nmi_pending", c_uint8),
        ("nmi_masked", c_uint8),
        ("pad", c_uint8),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", c_uint8 * 4),
        ("triple_fault_pending", c_uint8),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    )


EVENT_NMI_PENDING: Final = 1
EVENT_SHADOW: Final = 4


class Xcr(Structure):
    """``struct kvm_xcr``."""

    _fields_ = (("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64))


class Xcrs(Structure):
    """``struct kvm_xcrs``."""

    _fields_ = (
        ("nr_xcrs", c_uint32),
        ("flags", c_uint32),
        ("xcrs", Xcr * 16),
        ("padding", c_uint64 * 16),
    )


class MsrEntry(Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class CpuidEntry(Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


CPUID_INDEXED: Final = 1
"""A flag of :class:`CpuidEntry`: ``index`` (ecx) counts."""


class MemoryRegion(Structure):
    """``struct kvm_userspace_memory_region``."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


MEMORY_LOG: Final = 1
MEMORY_READ_ONLY: Final = 2


class DirtyLog(Structure):
    """``struct kvm_dirty_log``; ``bitmap`` is an address."""

    _fields_ = (("slot", c_uint32), ("padding", c_uint32), ("bitmap", c_uint64))


class SignalMask(Structure):
    """``struct kvm_signal_mask`` with the kernel's signal set: signal n is bit n - 1."""

    _pack_ = 4
    _fields_ = (("len", c_uint32), ("sigset", c_uint64))


class RunHeader(Structure):
    """The head of ``struct kvm_run``, up to its union."""

    _fields_ = (
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding", c_uint8 * 6),
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
    )


IO_EXIT: Final = "<BBHIQ"
"""An access to a port, in the union: direction (1 is out), size, port, count, data offset."""
MMIO_EXIT: Final = "<Q8sIB"
"""An access to memory, in the union: address, data, length, whether it is a write."""
FAIL_ENTRY: Final = "<Q"
"""A failed entry, in the union: the processor's reason."""
INTERNAL_ERROR: Final = "<II"
"""An internal error, in the union: its number, and how many words of 64 bits follow."""


class Reason(IntEnum):
    """``KVM_EXIT_*``: why ``KVM_RUN`` returned; those that a VM as ours can see."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24


INTERNAL_ERRORS: Final = {
    1: "an instruction that KVM does not emulate",
    2: "two exceptions at once",
    3: "an exit while an event was delivered",
    4: "an exit of a kind that KVM does not know",
}
"""``KVM_INTERNAL_ERROR_*``."""


class Capability(IntEnum):
    """``KVM_CAP_*``: what ``KVM_CHECK_EXTENSION`` is asked for."""

    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    EXT_CPUID = 7
    NR_MEMSLOTS = 10
    DESTROY_MEMORY_REGION_WORKS = 21
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    MAX_VCPUS = 66
    READONLY_MEM = 81
    IMMEDIATE_EXIT = 136
    XSAVE2 = 208


# Request numbers (asm-generic/ioctl.h): direction, size of the argument, 0xAE, number.


def _none(number: int) -> int:
    return 0xAE00 | number


def _write(number: int, size: int) -> int:
    return 1 << 30 | size << 16 | _none(number)


def _read(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | _none(number)


_HEAD: Final = 8
"""The head of an argument that ends in an array; the array does not count for the number."""
XSAVE_SIZE: Final = 4096
"""``sizeof(struct kvm_xsave)``."""

# Of /dev/kvm
GET_API_VERSION: Final = _none(0x00)
CREATE_VM: Final = _none(0x01)
GET_MSR_INDEX_LIST: Final = _read(0x02, 4) | _write(0x02, 4)
CHECK_EXTENSION: Final = _none(0x03)
GET_VCPU_MMAP_SIZE: Final = _none(0x04)
GET_SUPPORTED_CPUID: Final = _read(0x05, _HEAD) | _write(0x05, _HEAD)

# Of a VM
CREATE_VCPU: Final = _none(0x41)
GET_DIRTY_LOG: Final = _write(0x42, sizeof(DirtyLog))
SET_USER_MEMORY_REGION: Final = _write(0x46, sizeof(MemoryRegion))
SET_TSS_ADDR: Final = _none(0x47)

# Of a vCPU
RUN: Final = _none(0x80)
GET_REGS: Final = _read(0x81, sizeof(Regs))
SET_REGS: Final = _write(0x82, sizeof(Regs))
GET_SREGS: Final = _read(0x83, sizeof(Sregs))
SET_SREGS: Final = _write(0x84, sizeof(Sregs))
GET_MSRS: Final = _read(0x88, _HEAD) | _write(0x88, _HEAD)
SET_MSRS: Final = _write(0x89, _HEAD)
SET_SIGNAL_MASK: Final = _write(0x8B, 4)
SET_CPUID2: Final = _write(0x90, _HEAD)
GET_VCPU_EVENTS: Final = _read(0x9F, sizeof(Events))
SET_VCPU_EVENTS: Final = _write(0xA0, sizeof(Events))
GET_DEBUGREGS: Final = _read(0xA1, sizeof(DebugRegs))
SET_DEBUGREGS: Final = _write(0xA2, sizeof(DebugRegs))
GET_XSAVE: Final = _read(0xA4, XSAVE_SIZE)
SET_XSAVE: Final = _write(0xA5, XSAVE_SIZE)
GET_XCRS: Final = _read(0xA6, sizeof(Xcrs))
SET_XCRS: Final = _write(0xA7, sizeof(Xcrs))
GET_XSAVE2: Final = _read(0xCF, XSAVE_SIZE)
