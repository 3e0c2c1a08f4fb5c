"""What is particular to QEMU as a peer: its monitor protocol, driving one and starting one."""

from vmferry.qemu.driver import (
    MachineStatus,
    Migration,
    MigrationCancelled,
    query_machine,
)
from vmferry.qemu.info import MigrationInfo
from vmferry.qemu.process import QemuProcess, find_qemu
from vmferry.qemu.qmp import Qmp, QmpError

__all__ = [
    "MachineStatus",
    "Migration",
    "MigrationCancelled",
    "MigrationInfo",
    "QemuProcess",
    "Qmp",
    "QmpError",
    "find_qemu",
    "query_machine",
]
