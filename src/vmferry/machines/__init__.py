"""Machines that vmferry hosts itself: a small PC on KVM or on the Unicorn emulator.

::

    config = MachineConfig(ram=256 << 20, guest=GuestConfig(rate=10_000))
    with create(config, serial=console.feed) as machine:
        machine.start()

A machine is the same whoever hosts it: what was saved on KVM goes on in Unicorn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

from vmferry.errors import MachineError
from vmferry.images import Image, open_image

from .board import HostedMachine
from .bus import DeviceBus
from .config import DiskConfig, GuestConfig, MachineConfig, read_config
from .cpu import Bus, CpuHost
from .devices.disk import IoError, OnError

__all__ = [
    "DiskConfig",
    "GuestConfig",
    "HostedMachine",
    "IoError",
    "MachineConfig",
    "OnError",
    "create",
    "read_config",
    "usable_kind",
]


def create(
    config: MachineConfig,
    *,
    serial: Callable[[bytes], None],
    io_error: Callable[[IoError], None] | None = None,
    awaited: bool = False,
) -> HostedMachine:
    """The machine that *config* describes, at rest and with empty memory.

    Its images are active; those of one that is *awaited* from elsewhere are not.  *serial* is
    called with what the guest sends, in the thread of a vCPU: it must neither wait nor call the
    machine.  *io_error* is told of each request of a disk that its storage refused, in the thread
    of the disk, and has the machine paused by another thread where that is the action; without it
    the machine pauses itself.  ``auto`` is KVM where that works, and else Unicorn.  Raises
    :class:`~vmferry.errors.MachineError` where this host cannot run it, with what is missing, and
    :class:`~vmferry.errors.StorageError` for an image that cannot be opened.
    """
    kind = usable_kind() if config.kind == "auto" else config.kind
    with ExitStack() as undo:
        images = [undo.enter_context(_opened(disk, active=not awaited)) for disk in config.disk]
        machine = HostedMachine(
            config, _HOSTS[kind], serial=serial, io_error=io_error, images=images
        )
        undo.pop_all()
        return machine


def _opened(disk: DiskConfig, *, active: bool) -> Image:
    return open_image(
        disk.file,
        active=active,
        format=disk.format,
        read_only=disk.read_only,
        share_write=disk.share_rw,
        direct=disk.direct,
    )


def usable_kind() -> str:
    """What ``auto`` is here; raises :class:`~vmferry.errors.MachineError` where it is nothing."""
    missing = []
    for kind, make in _HOSTS.items():
        try:
            make(DeviceBus()).close()
        except MachineError as error:
            missing.append(str(error))
        else:
            return kind
    raise MachineError(f"no machine can be run here: {'; '.join(missing)}")


def _kvm(bus: Bus) -> CpuHost:
    from .kvm import KvmHost  # noqa: PLC0415

    return KvmHost(bus)


def _unicorn(bus: Bus) -> CpuHost:
    try:
        from .unicorn import UnicornHost  # noqa: PLC0415
    except ImportError as error:
        raise MachineError("Unicorn is not installed (pip install vmferry[unicorn])") from error
    return UnicornHost(bus)


_HOSTS: Final[Mapping[str, Callable[[Bus], CpuHost]]] = {"kvm": _kvm, "unicorn": _unicorn}
"""What hosts each kind, the best first."""
