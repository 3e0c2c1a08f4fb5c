"""QEMU's own bytes through declared devices: loaded, saved again, described."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.vmstate.devices import DEVICES, Hpet, Keyboard, PciBus, Pit, Rtc
from tests.vmstate.encode import encode
from tests.vmstate.redeclare import declare, without_inline
from tests.vmstate.tails import manifest, recorded
from vmferry.errors import StateError
from vmferry.vmstate import describe, load, save
from vmferry.vmstate.decode import decode_device
from vmferry.wire.description import parse_description

MACHINES = ["pc-2.3", "pc-many", "pc-10.0", "q35-many", "q35-running", "q35-10.0-early"]


def sections(machine: str) -> list[tuple[dict[str, Any], bytes]]:
    """The description and the body of each device that is declared here."""
    tail = recorded(machine)
    described = json.loads(tail.data[tail.devices_size + 6 :])["devices"][tail.early_devices :]
    return [
        (device, bytes(section.body))
        for device, section in zip(described, tail.sections, strict=True)
        if device["name"].split("/")[-1] in DEVICES
    ]


def captured(name: str, machine: str = "pc-many") -> tuple[dict[str, Any], bytes]:
    return next(found for found in sections(machine) if found[0]["name"].endswith(name))


OTHERWISE_IN_10 = {"hpet", "fdc", "globalstate"}
"""What QEMU 10.0 describes in other words than 7.2: new names, and an index for the first only."""


def made_for(name: str, body: bytes) -> Any:
    """An object that the body fits: a bus has as many lines as its machine gave it."""
    if name == "PCIBUS":
        lines = int.from_bytes(body[:4])
        return PciBus(lines, [0] * lines)
    return DEVICES[name]()


CAPTURED = [
    pytest.param(machine, device, body, id=f"{machine}-{device['name']}-{device['instance_id']}")
    for machine in MACHINES
    for device, body in sections(machine)
]


def test_most_devices_are_in_every_machine() -> None:
    assert len(CAPTURED) >= 80
    names = {device["name"].split("/")[-1] for device, _ in sections("pc-many")}
    assert names == DEVICES.keys()


@pytest.mark.parametrize(("machine", "device", "body"), CAPTURED)
def test_qemus_bytes_come_back_and_are_described_as_by_qemu(
    machine: str, device: dict[str, Any], body: bytes
) -> None:
    name = device["name"].split("/")[-1]
    obj = made_for(name, body)
    load(obj, body, device["version"])
    assert save(obj) == body
    described = {"name": device["name"], "instance_id": device["instance_id"]} | describe(obj)
    if "10.0" not in machine or name not in OTHERWISE_IN_10:
        assert described == device
    text = json.dumps({"page_size": 4096, "devices": [described]}).encode()
    (parsed,) = parse_description(text).devices
    assert encode(decode_device(parsed, body).root) == body


def test_values_are_those_of_a_machine_that_was_just_made() -> None:
    rtc, pit, hpet, keyboard = Rtc(), Pit(), Hpet(), Keyboard()
    for obj, name in ((rtc, "mc146818rtc"), (pit, "i8254"), (hpet, "hpet"), (keyboard, "ps2kbd")):
        device, body = captured(name)
        load(obj, body, device["version"])
    assert rtc.cmos_data[0x0A] == 0x26
    assert rtc.periodic_timer is None
    assert [channel.count for channel in pit.channels] == [65536] * 3
    assert [timer.tn for timer in hpet.timers] == [0, 1, 2]
    assert keyboard.parent_obj.write_cmd == -1
    assert keyboard.scancode_set == 2


def test_a_bus_with_other_lines_does_not_load() -> None:
    device, body = captured("PCIBUS")
    bus = PciBus(nirq=8, irq_count=[1] * 8)
    with pytest.raises(StateError, match=r"PCIBUS\.nirq: expected 8, as this device has, found 4"):
        load(bus, body, device["version"])
    assert bus == PciBus(nirq=8, irq_count=[1] * 8)


@pytest.mark.parametrize("machine", list(manifest()))
def test_every_device_can_be_declared(machine: str) -> None:
    tail = recorded(machine)
    described = json.loads(tail.data[tail.devices_size + 6 :])["devices"][tail.early_devices :]
    for entry, section in zip(described, tail.sections, strict=True):
        # QEMU 7.2 describes the pointers of s390_css as if all were NULL like the first.
        if "vmsd_name" not in entry or (machine, entry["name"]) == ("s390x", "s390_css"):
            continue
        body = bytes(section.body)
        obj = declare(entry)()
        load(obj, body, entry["version"])
        assert save(obj) == body, entry["name"]
        head = {"name": entry["name"], "instance_id": entry["instance_id"]}
        if "10.0" not in machine:
            assert head | describe(obj) == without_inline(entry)
