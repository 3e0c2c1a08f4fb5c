"""Processors of KVM, through ``/dev/kvm`` and from Python alone.

There is no interrupt controller: devices are polled, and a vCPU that halts is waked by the board.
"""

from .failures import CpuFailure
from .host import KvmHost, Slot
from .vcpu import KvmVcpu

__all__ = ["CpuFailure", "KvmHost", "KvmVcpu", "Slot"]
