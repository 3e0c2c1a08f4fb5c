"""Machines with many devices, saved while they run and resumed: and all is there again."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest

import vmferry
from tests.data.record import DRIVES
from tests.interop.lab import PC, Lab, Vm
from tests.support.capture import Scenario
from vmferry.qemu import QmpError

pytestmark = pytest.mark.qemu

NETWORK = "-netdev hubport,id=n0,hubid=0 -netdev hubport,id=n1,hubid=0"
CARDS = f"{NETWORK} -device virtio-net-pci,netdev=n0 -device e1000,netdev=n1"
USB = "-device qemu-xhci -device usb-tablet -device usb-kbd"
SOUND = "-audiodev none,id=a0 -device intel-hda -device hda-duplex,audiodev=a0"
DISKS = "-device virtio-blk-pci,drive=disk0 -device ide-hd,drive=disk1,bus="

# A machine, and sections that have to be in its stream.
MACHINES = [
    pytest.param(
        f"pc -smp 4 -vga std {CARDS} {USB} {SOUND} -device AC97,audiodev=a0 "
        f"-device ich9-ahci,id=ahci {DISKS}ahci.0",
        "*/virtio-net */e1000 */xhci */usb-ptr */usb-kbd */intel-hda */ac97 */ich9_ahci "
        "*/virtio-blk hpet */vga apic:3",
        id="pc",
    ),
    pytest.param(
        f"q35 -smp 4 -device VGA {CARDS} {USB} {SOUND} {DISKS}ide.0 -device virtio-rng-pci "
        "-device pcie-root-port,id=root1,chassis=1 -device virtio-balloon-pci,bus=root1",
        "*/virtio-net */e1000 */xhci */usb-ptr */usb-kbd */intel-hda */ich9_ahci */virtio-blk "
        "*/virtio-rng */virtio-balloon hpet */vga apic:3",
        id="q35",
    ),
    pytest.param(
        f"microvm,rtc=on -smp 2 {NETWORK} -device virtio-net-device,netdev=n0 "
        "-device virtio-blk-device,drive=disk0 -device virtio-rng-device",
        "*virtio-net *virtio-blk *virtio-rng mc146818rtc apic:1",
        id="microvm",
    ),
]

SHOWN = ("info pci", "info usb", "info network", "info qtree", "info mtree -f")
"""What QEMU's monitor says of a machine's devices, whatever the guest does."""


def on(machine: str, **changes: object) -> Scenario:
    arguments = ("-machine", *machine.split(), "-nodefaults")
    return replace(PC, machine=arguments, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("machine", "sections"), MACHINES)
def test_machine_has_all_its_devices_again(lab: Lab, machine: str, sections: str) -> None:
    """Bars, routes, memory map, USB ports and properties are those of the source, byte for byte."""
    scenario = on(machine, disks=DRIVES)
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    names = {f"{s.name}:{s.instance}" for s in checkpoint.manifest.sections}
    names |= {section.name for section in checkpoint.manifest.sections}
    missing = [p for p in sections.split() if not any(fnmatchcase(n, p) for n in names)]
    assert missing == [], sorted(names)
    shown = devices(source)
    resumed = lab.resume(checkpoint, scenario)
    assert devices(resumed) == shown
    lab.assert_goes_on(resumed, source, scenario)


def devices(vm: Vm) -> dict[str, list[list[str]]]:
    """The lines of each answer; address spaces and the views they share come in any order."""
    answers = {command: vm.qemu.hmp(command) for command in SHOWN}
    return {
        command: sorted(sorted(view.splitlines()) for view in re.split(r"FlatView #\d+", answer))
        for command, answer in answers.items()
    }


@pytest.mark.parametrize(
    "version", ["pc-i440fx-2.2", "pc-i440fx-2.3", "pc-i440fx-2.4", "pc-q35-4.0"]
)
def test_machine_of_an_older_version_goes_on(lab: Lab, version: str) -> None:
    """Before 2.4 there are no footers and no configuration, before 2.3 no description either."""
    scenario = on(version)
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    ancient = version in {"pc-i440fx-2.2", "pc-i440fx-2.3"}
    assert checkpoint.footers != ancient
    assert checkpoint.manifest.machine == (None if ancient else version)
    assert (checkpoint.description is None) == (version == "pc-i440fx-2.2")
    lab.assert_goes_on(lab.resume(checkpoint, scenario), source, scenario)


def test_machine_that_was_booted_from_its_disk_goes_on(lab: Lab) -> None:
    """The firmware has driven the rings of a virtio disk, which point into guest memory."""
    boot = "-device virtio-blk-pci,drive=disk0,bootindex=0"
    scenario = on(f"pc {boot}", start="disk", disks=DRIVES[:1])
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    lab.assert_goes_on(lab.resume(checkpoint, scenario), source, scenario)


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no KVM on this machine")
def test_machine_under_kvm_goes_on(lab: Lab) -> None:
    """The kernel runs the guest, keeps its own dirty log and has state of its own to save."""
    guest = (("pages", 64), ("hot", 16))
    scenario = on("pc,accel=kvm", start="firmware", guest=guest, memory=2, bandwidth=1 << 20)
    try:
        source = lab.source(scenario)
    except vmferry.PeerError as error:
        pytest.skip(f"KVM does not work on this machine: {error}")
    checkpoint = lab.receive(source, scenario)
    assert "kvmclock" in {section.name for section in checkpoint.manifest.sections}
    lab.assert_goes_on(lab.resume(checkpoint, scenario), source, scenario)


def test_machine_with_an_nvme_disk_is_refused_by_qemu_itself(lab: Lab) -> None:
    """QEMU 7.2 cannot migrate ``nvme``, so nothing ever arrives, and the machine runs on."""
    source = lab.source(on("pc -device nvme,drive=disk0,serial=1", disks=DRIVES[:1]))
    arrival = lab.arrival()
    with pytest.raises(QmpError, match=r"non-migratable device '0000:00:02.0/nvme'"):
        source.qemu.migrate(arrival.address)
    arrival.destination.cancel()
    with pytest.raises(vmferry.ChannelClosed):
        arrival.result()
    source.serial.wait_beat(after=source.serial.drain())
