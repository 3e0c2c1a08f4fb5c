"""Nothing is lost on the way: what was received is sent, and comes again, exactly as it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import vmferry
from tests.data.record import DISKS, DRIVES, UUID, add_bitmaps
from tests.interop.lab import PC, Lab
from tests.support.capture import Scenario
from vmferry.checkpoint.manifest import Manifest
from vmferry.vmstate.tree import Array, Raw, Value
from vmferry.wire.devices import DeviceRegion, DeviceSection

pytestmark = pytest.mark.qemu

SCENARIOS = [
    pytest.param(replace(PC, machine=("-machine", "pc", "-vga", "std")), id="pc"),
    pytest.param(
        replace(
            PC,
            machine=(*DISKS, "-uuid", UUID),
            disks=DRIVES,
            before=add_bitmaps,
            capabilities=("block", "dirty-bitmaps", "validate-uuid", "return-path"),
        ),
        id="disks-bitmaps-uuid",
    ),
    pytest.param(
        replace(PC, machine=("-machine", "pc-i440fx-2.3", "-nodefaults")), id="without-footers"
    ),
    pytest.param(
        replace(PC, machine=("-machine", "pc-i440fx-2.2", "-nodefaults")), id="without-description"
    ),
    pytest.param(
        replace(PC, machine=("-machine", "microvm", "-nodefaults", "-smp", "2")), id="microvm"
    ),
]


def essence(checkpoint: vmferry.Checkpoint) -> Manifest:
    """All of a manifest, with the checksums of each file, but when and how it came."""
    checkpoint.verify()
    return replace(checkpoint.manifest, created="", capabilities=())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_stream_of_a_checkpoint_gives_the_same_checkpoint(lab: Lab, scenario: Scenario) -> None:
    """Memory, devices, disks and bitmaps are equal, and a second stream is so byte for byte."""
    first = lab.receive(lab.source(scenario), scenario)
    streams = [lab.directory() / "stream" for _ in range(2)]
    vmferry.send(first, f"file:{streams[0]}")
    second = lab.saved(lab.arrival(f"file:{streams[0]}").result(), scenario)
    assert essence(second) == essence(first)
    vmferry.send(second, f"file:{streams[1]}")
    assert streams[0].read_bytes() == streams[1].read_bytes()
    assert contents(vmferry.open_stream(streams[0])) == contents(first.survey())


def contents(survey: vmferry.Survey) -> dict[str, Any]:
    """What a stream and a checkpoint of the same machine have to agree in."""
    return {
        "configuration": survey.configuration,
        "footers": survey.footers,
        "page size": survey.page_size,
        "blocks": [(b.block, b.data_pages, b.zero_pages, b.unsent_pages) for b in survey.blocks],
        "disks": survey.disks,
        "bitmaps": survey.bitmaps,
        "devices": bodies(survey.devices),
        "description": survey.description,
    }


def bodies(devices: Sequence[DeviceSection | DeviceRegion]) -> list[Any]:
    return [
        (device.name, device.instance, device.version, bytes(device.body))
        if isinstance(device, DeviceSection)
        else bytes(device.body)
        for device in devices
    ]


METHODS = (vmferry.Method.NONE, vmferry.Method.ZLIB, vmferry.Method.ZSTD)
MULTIFD = [
    pytest.param(channels, method, id=f"{channels}-{method.name.lower()}")
    for channels in (1, 3)
    for method in METHODS
]


@pytest.mark.parametrize(("channels", "method"), MULTIFD)
def test_checkpoint_sent_by_multifd_is_the_same(
    lab: Lab, channels: int, method: vmferry.Method
) -> None:
    """From vmferry to vmferry, by any number of channels and with any compression."""
    first = lab.receive(lab.source())
    arrival = lab.arrival()
    options = vmferry.SendOptions(multifd=channels, method=method)
    vmferry.send(first, arrival.address, options=options)
    assert essence(lab.saved(arrival.result(), PC)) == essence(first)


@pytest.mark.parametrize("method", sorted(set(vmferry.Method) - set(METHODS)))
def test_compression_that_needs_hardware_is_a_usage_error(lab: Lab, method: vmferry.Method) -> None:
    """Before anything is sent, though QEMU has a number for it."""
    checkpoint = lab.receive(lab.source())
    options = vmferry.SendOptions(multifd=1, method=method)
    with pytest.raises(vmferry.UsageError, match=f"not with {method.name.lower()}"):
        vmferry.send(checkpoint, f"unix:{lab.path}/nobody", options=options)


def test_qemu_saves_again_what_it_was_sent(lab: Lab) -> None:
    """A machine that was resumed without being let run is the same one, value by value."""
    machine = (*DISKS, "-vga", "std", "-smp", "2", "-rtc", "clock=vm")  # it stands still too
    scenario = replace(PC, machine=machine, disks=DRIVES)
    source = lab.source(scenario)
    source.qemu.execute("stop")
    first = lab.receive(source, scenario)
    second = lab.receive(lab.resume(first, scenario), scenario)
    assert second.manifest.ram == first.manifest.ram
    saved, again = leaves(first), leaves(second)
    # Where no request was to be tried again, QEMU saves -1 at first, and 0 once it has loaded that.
    changed = {path for path in saved | again if saved.get(path) != again.get(path)}
    assert changed <= {"0000:00:01.1/ide:0 bmdma[1].migration_retry_sector_num"}


def leaves(checkpoint: vmferry.Checkpoint) -> dict[str, Any]:
    """Every decoded value of a machine, by device and path."""
    return {
        f"{state.name}:{state.instance} {path}": node.to_json() | {"offset": 0}
        for state in checkpoint.survey().states()
        for path, node in state.walk()
        if isinstance(node, Value | Array | Raw)
    }
