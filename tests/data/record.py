"""Record the streams in this directory anew: ``python -m tests.data.record [NAME...]``.

Each is a migration of a running walker by the QEMU that is installed, with little in memory, so
that it compresses to a few kilobytes.  manifest.json says how each was made.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import zstandard

from tests.support.capture import Migrated, Scenario, migrated
from tests.support.recorded import DATA
from vmferry.qemu import QemuProcess, find_qemu

PC = Scenario(
    machine=("-machine", "pc", "-nodefaults"),
    memory=2,
    guest=(("pages", 64), ("hot", 24)),
    start="firmware",
    bandwidth=1 << 20,
)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# No option ROMs: they are large and always the same.
Q35_DEVICES = _words(
    "-machine q35 -nodefaults -smp 2 -device VGA,romfile=,vgamem_mb=1 "
    "-netdev hubport,id=n0,hubid=0 -device virtio-net-pci,netdev=n0,romfile= "
    "-netdev hubport,id=n1,hubid=0 -device e1000,netdev=n1,romfile= "
    "-device qemu-xhci -device usb-tablet -device usb-kbd "
    "-drive if=none,id=d0,driver=null-co,size=1M -device virtio-blk-pci,drive=d0 "
    "-drive if=none,id=d1,driver=null-co,size=1M -device ide-hd,drive=d1 "
    "-device virtio-scsi-pci -device virtio-rng-pci -device virtio-balloon-pci"
)
MICROVM = _words(
    "-machine microvm,rtc=on -nodefaults -netdev hubport,id=n0,hubid=0 "
    "-device virtio-net-device,netdev=n0 -device virtio-rng-device"
)
DISKS = _words(
    "-machine pc -nodefaults -device virtio-blk-pci,drive=disk0 -device ide-hd,drive=disk1"
)
DRIVES = ("if=none,id=disk0", "if=none,id=disk1")
UUID = "00112233-4455-6677-8899-aabbccddeeff"
SHARED = _words(
    "-machine pc,memory-backend=m0 -nodefaults "
    "-object memory-backend-memfd,id=m0,size={ram},share=on"
)


def add_bitmaps(vm: QemuProcess) -> None:
    """Three dirty bitmaps, two of them with something in them."""
    for node, name, granularity in (
        ("disk0", "b0", 65536),
        ("disk0", "b1", 512),
        ("disk1", "b2", 512),
    ):
        arguments = {"node": node, "name": name, "granularity": granularity}
        vm.execute("block-dirty-bitmap-add", arguments)
    vm.execute("block-dirty-bitmap-disable", {"node": "disk1", "name": "b2"})
    vm.hmp('qemu-io disk0 "write -P 90 64k 128k"')


def multifd(compression: str, channels: int) -> Scenario:
    parameters = (("multifd-channels", channels), ("multifd-compression", compression))
    return replace(PC, capabilities=("multifd",), parameters=parameters)


def postcopy(*capabilities: str) -> Scenario:
    """Switched over in the first pass, and slow afterwards, so that pages are asked for."""
    return replace(
        PC,
        guest=(("pages", 256),),
        capabilities=capabilities,
        parameters=(("max-postcopy-bandwidth", 2 << 20),),
        rounds=0,
        destination=True,
        postcopy=True,
    )


SCENARIOS = {
    "pc": PC,
    "pc-2.2": replace(PC, machine=("-machine", "pc-i440fx-2.2", "-nodefaults")),
    "pc-2.3": replace(PC, machine=("-machine", "pc-i440fx-2.3", "-nodefaults")),
    "pc-uuid": replace(PC, machine=(*PC.machine, "-uuid", UUID), capabilities=("validate-uuid",)),
    "pc-ignore-shared": replace(PC, machine=SHARED, capabilities=("x-ignore-shared",)),
    "pc-background-snapshot": replace(PC, capabilities=("background-snapshot",)),
    "q35-devices": replace(PC, machine=Q35_DEVICES),
    "microvm": replace(PC, machine=MICROVM),
    "ppc-g3beige": replace(PC, target="ppc", machine=_words("-machine g3beige -nodefaults")),
    "ppc64-pseries": replace(
        PC, target="ppc64", machine=_words("-machine pseries -nodefaults"), memory=256
    ),
    "pc-xbzrle": replace(PC, capabilities=("xbzrle",), rounds=5),
    "pc-compress": replace(PC, capabilities=("compress",)),
    "pc-multifd": multifd("none", 2),
    "pc-multifd-zlib": multifd("zlib", 3),
    "pc-multifd-zstd": multifd("zstd", 3),
    "pc-return-path": replace(PC, capabilities=("return-path",), destination=True),
    "pc-postcopy-advised": replace(PC, capabilities=("postcopy-ram",), destination=True),
    "pc-postcopy": postcopy("postcopy-ram"),
    "pc-postcopy-preempt": postcopy("postcopy-ram", "postcopy-preempt"),
    "pc-block": replace(PC, machine=DISKS, disks=DRIVES, capabilities=("block",)),
    "pc-block-zero": replace(
        PC, machine=DISKS, disks=DRIVES, capabilities=("block", "zero-blocks")
    ),
    "pc-bitmaps": replace(
        PC, machine=DISKS, disks=DRIVES, capabilities=("dirty-bitmaps",), before=add_bitmaps
    ),
}


def main(names: list[str]) -> None:
    """Record the streams *names*, or all, and write the manifest."""
    path = DATA / "manifest.json"
    streams: dict[str, Any] = json.loads(path.read_text())["streams"] if names else {}
    for name in names or SCENARIOS:
        with migrated(SCENARIOS[name]) as done:
            streams[name] = _record(name, SCENARIOS[name], done)
    version = subprocess.run([find_qemu(), "--version"], capture_output=True, text=True, check=True)
    content = {"qemu": version.stdout.splitlines()[0], "streams": streams}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _record(name: str, scenario: Scenario, done: Migrated) -> dict[str, Any]:
    channels = []
    for number, channel in enumerate(done.channels):
        stem = name if len(done.channels) == 1 else f"{name}.{number}"
        channels.append(
            {
                "sent": _store(f"{stem}.zst", channel.sent),
                "answered": _store(f"{stem}.answers.zst", channel.answered),
            }
        )
    command = re.sub(r"/\S*/vmferry-capture-\w+/", "", " ".join(done.source.command))
    return {
        "command": re.sub(r".*/(?=qemu-system)", "", command),
        "capabilities": list(scenario.capabilities),
        "parameters": dict(scenario.parameters),
        "guest": dict(scenario.guest),
        "ram": scenario.ram_size,
        "channels": channels,
    }


def _store(file: str, content: bytearray) -> dict[str, Any] | None:
    if not content:
        return None
    (DATA / file).write_bytes(zstandard.ZstdCompressor(level=19).compress(content))
    digest = hashlib.sha256(content).hexdigest()
    return {"file": file, "size": len(content), "sha256": digest}


if __name__ == "__main__":
    main(sys.argv[1:])
