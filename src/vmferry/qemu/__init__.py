"""What is particular to QEMU as a peer: its monitor protocol, and starting one."""

from vmferry.qemu.process import QemuProcess, find_qemu
from vmferry.qemu.qmp import Qmp, QmpError

__all__ = ["QemuProcess", "Qmp", "QmpError", "find_qemu"]
