"""``/dev/kvm``: whether it can be used, and what it offers."""

from __future__ import annotations

import fcntl
import os
import struct
from ctypes import sizeof
from typing import Final

from vmferry.errors import MachineError

from . import abi
from .abi import Capability, CpuidEntry

_NEEDED: Final = (
    Capability.USER_MEMORY,
    Capability.DESTROY_MEMORY_REGION_WORKS,
    Capability.SET_TSS_ADDR,
    Capability.EXT_CPUID,
    Capability.VCPU_EVENTS,
    Capability.DEBUGREGS,
    Capability.XSAVE,
    Capability.XCRS,
    Capability.IMMEDIATE_EXIT,
)
_MANY: Final = 512
"""Entries to ask for where KVM says how many there are: more than any kernel has."""


class Kvm:
    """An open ``/dev/kvm`` that has all that a machine needs.

    Raises :class:`MachineError` with what is missing and what helps.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._path = path
        self._fd = _open(path)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def extension(self, capability: Capability) -> int:
        """What KVM says to a capability: 0 for no, else yes or a number."""
        return fcntl.ioctl(self._fd, abi.CHECK_EXTENSION, int(capability))

    def create_vm(self) -> int:
        """The descriptor of a new VM."""
        try:
            return fcntl.ioctl(self._fd, abi.CREATE_VM, 0)
        except OSError as error:
            raise MachineError(f"{self._path}: no VM could be made: {error.strerror}") from error

    @property
    def run_size(self) -> int:
        """Bytes of the ``kvm_run`` of a vCPU, with what follows it."""
        return fcntl.ioctl(self._fd, abi.GET_VCPU_MMAP_SIZE, 0)

    def supported_cpuid(self) -> bytes:
        """What ``cpuid`` can tell a guest here, in entries: all features that KVM supports."""
        buffer = bytearray(8 + _MANY * sizeof(CpuidEntry))
        struct.pack_into("<I", buffer, 0, _MANY)
        fcntl.ioctl(self._fd, abi.GET_SUPPORTED_CPUID, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return bytes(buffer[8 : 8 + count * sizeof(CpuidEntry)])

    def msr_indices(self) -> tuple[int, ...]:
        """The model-specific registers that hold state, as KVM lists them."""
        buffer = bytearray(4 + 4 * _MANY)
        struct.pack_into("<I", buffer, 0, _MANY)
        fcntl.ioctl(self._fd, abi.GET_MSR_INDEX_LIST, buffer)
        (count,) = struct.unpack_from("<I", buffer)
        return struct.unpack_from(f"<{count}I", buffer, 4)

    def close(self) -> None:
        """Close the device; VMs go on without it."""
        os.close(self._fd)

    def _check(self) -> None:
        try:
            version = fcntl.ioctl(self._fd, abi.GET_API_VERSION, 0)
        except OSError as error:
            raise MachineError(f"{self._path} is no KVM device: {error.strerror}") from error
        if version != abi.API_VERSION:
            raise MachineError(
                f"{self._path}: expected version {abi.API_VERSION} of the interface, found "
                f"{version}; a Linux kernel since 2.6.22 has it"
            )
        missing = [f"KVM_CAP_{need.name}" for need in _NEEDED if not self.extension(need)]
        if missing:
            raise MachineError(
                f"{self._path}: this kernel lacks {', '.join(missing)}; Linux 4.12 has them"
            )


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MachineError(
            f"there is no {path}: the processor or the hypervisor around this machine offers no "
            "virtualization, or the module kvm_intel or kvm_amd is not loaded"
        ) from error
    except PermissionError as error:
        raise MachineError(
            f"{path} may not be used: become a member of the group that owns it, mostly kvm"
        ) from error
    except OSError as error:
        raise MachineError(f"{path} cannot be opened: {error.strerror}") from error
