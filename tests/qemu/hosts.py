"""Machines hosted in the process of the test, each with a monitor."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmferry.machines import GuestConfig, MachineConfig
from vmferry.machines.observer import check
from vmferry.qemu import Qmp
from vmferry.qemu.hosting import Host

PATIENCE = 60.0

SMALL = MachineConfig(
    ram=8 << 20, guest=GuestConfig(working_set=1 << 20, rate=2000, heartbeat=0.01)
)
"""Its guest rewrites 8 MB a second, in 1 MiB."""

HELD: dict[str, object] = {"max-bandwidth": 1 << 20, "downtime-limit": 1}
"""Keeps it from coming to an end."""


class Hosts:
    """Starts hosts, all closed in the end; the sockets of their monitors are in *path*."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self._path = path
        self._count = 0

    def start(self, config: MachineConfig = SMALL, **options: Any) -> tuple[Host, Qmp]:
        """A host and a session with its monitor."""
        self._count += 1
        monitor = self._path / f"monitor{self._count}"
        host = self._stack.enter_context(Host(config, monitor=monitor, **options))
        return host, self._stack.enter_context(Qmp.connect(str(monitor), timeout=PATIENCE))

    def uri(self) -> str:
        """A place to migrate to."""
        self._count += 1
        return f"unix:{self._path}/incoming{self._count}"


def assert_intact(host: Host) -> None:
    """The guest is alive, has found nothing wrong, and nor does an observer of all its pages."""
    host.console.wait_beat(PATIENCE)
    host.console.check()
    host.machine.pause()
    assert check(host.machine.memory, host.machine.config) == []
