"""The last part of real streams, from the first device on: recorded, or made by the QEMU here.

Recorded ones lie in ``data``: ``<name>.xz`` is the tail, and ``manifest.json`` says what made it.
``python -m tests.vmstate.tails NAME...`` makes them anew, with the QEMU that is installed or, for
x86_64, the one that VMFERRY_QEMU names.
"""

from __future__ import annotations

import functools
import hashlib
import json
import lzma
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmferry.qemu import QemuProcess
from vmferry.wire.description import VmDescription, parse_description
from vmferry.wire.devices import DeviceSection, split_devices

DATA = Path(__file__).parent / "data"

_DISK = 4 << 20


@dataclass(frozen=True)
class Machine:
    """Arguments for QEMU; ``{disk}`` in them is the path of an empty image, a fresh one each."""

    arguments: str
    target: str = "x86_64"
    paused: bool = True

    @property
    def command(self) -> list[str]:
        """The arguments one by one."""
        return [*self.arguments.split(), *(["-S"] if self.paused else [])]


_PC_MANY = """
    -machine pc -m 16 -vga cirrus -audiodev none,id=au -device sb16,audiodev=au
    -device adlib,audiodev=au -device gus,audiodev=au -device cs4231a,audiodev=au
    -device ne2k_pci -device i82550 -device megasas -device mptsas1068 -device pvscsi
    -device am53c974 -device sdhci-pci -drive file={disk},format=raw,if=none,id=d0
    -device sd-card,drive=d0 -device ib700 -device piix3-usb-uhci -device usb-mouse -device usb-hub
    -device usb-ehci -device pci-ohci -device virtio-gpu-pci -device virtio-keyboard-pci
    -device virtio-rng-pci -device virtio-balloon-pci -device virtio-serial-pci
"""
_Q35_MANY = """
    -machine q35 -m 16 -smp 4 -drive file={disk},format=raw,if=none,id=d0
    -drive file={disk},format=raw,if=none,id=d1 -drive file={disk},format=raw,if=none,id=d2
    -device ide-hd,drive=d0,bus=ide.0 -device qemu-xhci -device usb-tablet -device usb-kbd
    -device usb-storage,drive=d1 -netdev user,id=n0 -device e1000,netdev=n0 -device e1000e
    -device rtl8139 -device vmxnet3 -device pcnet -device tulip -audiodev none,id=au
    -device intel-hda -device hda-duplex,audiodev=au -device AC97,audiodev=au
    -device ipmi-bmc-sim,id=bmc0 -device isa-ipmi-kcs,bmc=bmc0 -device virtio-iommu-pci
    -device lsi53c895a,id=lsi -device scsi-hd,drive=d2,bus=lsi.0 -device i6300esb -device pvpanic
    -device pcie-root-port,id=rp,chassis=1 -device virtio-net-pci,bus=rp
"""
_MICROVM = """
    -machine microvm -m 16 -device virtio-rng-device -device virtio-net-device
    -drive file={disk},format=raw,if=none,id=d0 -device virtio-blk-device,drive=d0
"""

MACHINES = {
    "microvm": Machine(_MICROVM),
    "pc-2.3": Machine("-machine pc-i440fx-2.3 -m 16"),
    "pc-many": Machine(_PC_MANY),
    "q35-many": Machine(_Q35_MANY),
    "q35-running": Machine("-machine q35 -m 64 -smp 2", paused=False),
    "pc-10.0": Machine("-machine pc -m 16"),
    "q35-10.0-early": Machine(
        "-machine q35 -m 64,maxmem=1G -object memory-backend-ram,id=vm0,size=16M"
        " -device virtio-mem-pci,memdev=vm0"
    ),
    "s390x": Machine("-machine s390-ccw-virtio -m 128 -smp 2 -device virtio-rng-ccw", "s390x"),
    "s390x-10.0": Machine("-machine s390-ccw-virtio -m 128 -device virtio-rng-ccw", "s390x"),
    "mac99": Machine("-machine mac99 -m 64", "ppc"),
    "virt": Machine("-machine virt -cpu cortex-a57 -m 64 -smp 2", "aarch64"),
}
"""What the recorded tails were made of, with QEMU 7.2.22 or, where the name says so, 10.0.2."""


@dataclass(frozen=True)
class Tail:
    """The bytes from the first device (but early ones) to the end, and those of early devices."""

    data: bytes
    early: bytes
    footers: bool

    @functools.cached_property
    def description(self) -> VmDescription:
        """The closing description."""
        return parse_description(self.data[self.devices_size + 6 :])

    @functools.cached_property
    def devices_size(self) -> int:
        """Bytes up to the end-of-stream byte, by the one rule that needs the whole stream."""
        return description_offset(self.data) - 1

    @property
    def early_devices(self) -> int:
        """How many of the described devices are not in ``data``."""
        return 1 if self.early else 0

    @functools.cached_property
    def sections(self) -> tuple[DeviceSection, ...]:
        """The device sections, taken apart."""
        return split_devices(
            self.data[: self.devices_size],
            self.description,
            footers=self.footers,
            offset=0,
            early=self.early_devices,
        )


def description_offset(stream: bytes) -> int:
    """Where the description begins: a type byte and a length that reaches to the very end."""
    at = len(stream)
    while (at := stream.rfind(b"\0\6", 0, at)) >= 0:
        if at + 6 + int.from_bytes(stream[at + 2 : at + 6]) == len(stream):
            return at + 1
    raise ValueError("no description")


def tail_of(stream: bytes) -> Tail:
    """The tail of a whole stream; devices whose names say so are early ones."""
    at = description_offset(stream)
    description = parse_description(stream[at + 5 :])
    early = [device for device in description.devices if device.name.endswith("-early")]
    first = _start_of(stream, description, len(early))
    footers = stream[first - 5] == 0x7E
    early_at = _start_of(stream, description, 0)
    size = sum(14 + len(device.name) + device.size + 5 for device in early)
    return Tail(stream[first:], stream[early_at : early_at + size] if early else b"", footers)


def _start_of(stream: bytes, description: VmDescription, index: int) -> int:
    device = description.devices[index]
    name = device.name.encode()
    return stream.rindex(bytes([len(name)]) + name + device.instance.to_bytes(4)) - 5


@contextmanager
def migrated(machine: Machine) -> Iterator[tuple[QemuProcess, bytes]]:
    """Migrate *machine* to a file: QEMU, stopped behind its migration, and the stream."""
    with tempfile.TemporaryDirectory(prefix="vmferry-tail-") as directory:
        command = []
        for number, argument in enumerate(machine.command):
            disk = Path(directory) / f"disk{number}"
            if "{disk}" in argument:
                disk.write_bytes(bytes(_DISK))
            command.append(argument.format(disk=disk))
        stream = Path(directory) / "stream"
        with QemuProcess(command, target=machine.target) as qemu:
            qemu.migrate(f"exec:cat > {stream}", parameters={"max-bandwidth": 1 << 40})
            qemu.wait_migration()
            yield qemu, stream.read_bytes()


@functools.cache
def manifest() -> dict[str, Any]:
    """What is recorded, by name."""
    found: dict[str, Any] = json.loads((DATA / "manifest.json").read_text())
    return found


@functools.cache
def recorded(name: str) -> Tail:
    """A recorded tail."""
    entry = manifest()[name]
    data = lzma.decompress((DATA / f"{name}.xz").read_bytes())
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{name}.xz is not what the manifest says")
    return Tail(data, bytes.fromhex(entry["early"]), entry["footers"])


def record(name: str) -> None:
    """Make the tail *name* anew."""
    machine = MACHINES[name]
    with migrated(machine) as (qemu, stream):
        version = qemu.execute("query-version")["qemu"]
    tail = tail_of(stream)
    packed = lzma.compress(tail.data, preset=9 | lzma.PRESET_EXTREME)
    (DATA / f"{name}.xz").write_bytes(packed)
    path = DATA / "manifest.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[name] = {
        "qemu": "{major}.{minor}.{micro}".format(**version),
        "command": f"qemu-system-{machine.target} {' '.join(machine.command)}",
        "early": tail.early.hex(),
        "footers": tail.footers,
        "sha256": hashlib.sha256(tail.data).hexdigest(),
    }
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or MACHINES:
        record(wanted)
