"""Machines that vmferry hosts itself: a small PC on KVM or on the Unicorn emulator.

::

    config = MachineConfig(ram=256 << 20, guest=GuestConfig(rate=10_000))
    with create(config, serial=console.feed) as machine:
        machine.start()

A machine is the same whoever hosts it: what was saved on KVM goes on in Unicorn.
"""

from __future__ import annotations

from collections.abc import Callable

from vmferry.errors import MachineError

from .board import HostedMachine
from .config import GuestConfig, MachineConfig, read_config
from .cpu import Bus, CpuHost

__all__ = ["GuestConfig", "HostedMachine", "MachineConfig", "create", "read_config"]


def create(config: MachineConfig, *, serial: Callable[[bytes], None]) -> HostedMachine:
    """The machine that *config* describes, at rest and with empty memory.

    *serial* is called with what the guest sends, in the thread of a vCPU: it must neither wait nor
    call the machine.  ``auto`` is KVM where that works, and else Unicorn.  Raises
    :class:`~vmferry.errors.MachineError` where this host cannot run it, with what is missing.
    """
    return HostedMachine(config, _host(config.kind), serial=serial)


def _host(kind: str) -> Callable[[Bus], CpuHost]:
    return {"auto": _auto, "kvm": _kvm, "unicorn": _unicorn}[kind]


def _auto(bus: Bus) -> CpuHost:
    try:
        return _kvm(bus)
    except MachineError as kvm:
        try:
            return _unicorn(bus)
        except MachineError as unicorn:
            raise MachineError(f"no machine can be run here: {kvm}; {unicorn}") from kvm


def _kvm(bus: Bus) -> CpuHost:
    from .kvm import KvmHost  # noqa: PLC0415

    return KvmHost(bus)


def _unicorn(bus: Bus) -> CpuHost:
    try:
        from .unicorn import UnicornHost  # noqa: PLC0415
    except ImportError as error:
        raise MachineError("Unicorn is not installed (pip install vmferry[unicorn])") from error
    return UnicornHost(bus)
