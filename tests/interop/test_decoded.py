"""Decoded device state against what QEMU itself says of the stopped source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import vmferry
from tests.interop.lab import PC, Lab, Vm
from vmferry.vmstate.tree import Array, DeviceState, Raw, Value

pytestmark = pytest.mark.qemu

GENERAL = ("EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI")
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS")
SHOWN_FLAGS = 0x00FFFF00
"""Those of a segment's flags that QEMU shows."""


def saved(lab: Lab, machine: str) -> tuple[Vm, vmferry.Checkpoint]:
    """A stopped machine and its checkpoint."""
    scenario = replace(PC, machine=tuple(machine.split()))
    source = lab.source(scenario)
    return source, lab.receive(source, scenario)


def state_of(checkpoint: vmferry.Checkpoint, name: str) -> DeviceState:
    [state] = checkpoint.survey().states(name)
    return state


def value(state: DeviceState, path: str) -> int:
    node = state[path]
    assert isinstance(node, Value)
    assert node.value is not None
    return node.value


def values(state: DeviceState, path: str) -> list[int]:
    node = state[path]
    assert isinstance(node, Array)
    return node.values.tolist()


def raw(state: DeviceState, path: str) -> bytes:
    node = state[path]
    assert isinstance(node, Raw)
    return node.data


@pytest.mark.parametrize("processors", [1, 4])
def test_processors_are_as_qemu_shows_them(lab: Lab, processors: int) -> None:
    """All general, segment, control, debug, floating-point and SSE registers of each processor."""
    source, checkpoint = saved(lab, f"-machine pc -nodefaults -smp {processors}")
    blocks = source.qemu.hmp("info registers -a").split("CPU#")[1:]
    assert len(blocks) == processors
    for number, shown in enumerate(blocks):
        cpu = state_of(checkpoint, f"cpu:{number}")
        assert dict(decoded(cpu)) == dict(registers(shown))
        halted = value(state_of(checkpoint, f"cpu_common:{number}"), "halted")
        assert f"HLT={halted}" in shown
    assert ("HLT=1" in blocks[-1]) == (processors > 1)


def registers(shown: str) -> Iterator[tuple[str, Any]]:
    """The registers that QEMU shows, in text."""
    for name, number in re.findall(r"\b(E\w\w|[CD]R\d|EFER|FCW|MXCSR)=(\w+)", shown):
        yield name, int(number, 16)
    for name, *numbers in re.findall(r"(\w\w\w?) ?=(\w{4}) (\w{8}) (\w{8}) (\w{8}) DPL", shown):
        yield name, [int(number, 16) for number in numbers]
    for name, *numbers in re.findall(r"([GI]DT)= +(\w+) (\w+)", shown):
        yield name, [int(number, 16) for number in numbers]
    for name, *numbers in re.findall(r"(FPR\d|XMM\d\d)=(\w+) (\w+)", shown):
        yield name, [int(number, 16) for number in numbers]


def decoded(cpu: DeviceState) -> Iterator[tuple[str, Any]]:
    """The same registers of a decoded ``cpu`` section."""
    yield from zip(GENERAL, values(cpu, "env.regs"), strict=False)
    yield "EIP", value(cpu, "env.eip")
    yield "EFL", value(cpu, "env.eflags")
    for number in (0, 2, 3, 4):
        yield f"CR{number}", value(cpu, f"env.cr[{number}]")
    debug = values(cpu, "env.dr")
    for number in (0, 1, 2, 3, 6, 7):
        yield f"DR{number}", debug[number]
    yield "EFER", value(cpu, "env.efer")
    yield "FCW", value(cpu, "env.fpuc")
    yield "MXCSR", value(cpu, "env.mxcsr")
    segments = [(name, f"env.segs[{number}]") for number, name in enumerate(SEGMENTS)]
    for name, path in [*segments, ("LDT", "env.ldt"), ("TR", "env.tr")]:
        numbers = [value(cpu, f"{path}.{part}") for part in ("selector", "base", "limit")]
        yield name, [*numbers, value(cpu, f"{path}.flags") & SHOWN_FLAGS]
    for name in ("GDT", "IDT"):
        yield name, [value(cpu, f"env.{name.lower()}.{part}") for part in ("base", "limit")]
    for number in range(8):
        path = f"env.fpregs[{number}].tmp.tmp_"
        yield f"FPR{number}", [value(cpu, path + "mant"), value(cpu, path + "exp")]
        path = f"env.xmm_regs[0][{number}]._q_ZMMReg"
        yield f"XMM{number:02}", [value(cpu, f"{path}[{half}]") for half in (1, 0)]


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm,rtc=on"])
def test_clock_is_the_one_that_qemu_shows(lab: Lab, machine: str) -> None:
    """The bytes of the real-time clock are the date that QMP gives, in binary-coded decimals."""
    clock = "base=2031-12-30T23:59:41,clock=vm"  # it stands still when the machine does
    source, checkpoint = saved(lab, f"-machine {machine} -nodefaults -rtc {clock}")
    shown = source.qemu.execute("qom-get", {"path": "/machine", "property": "rtc-time"})
    cmos = raw(state_of(checkpoint, "mc146818rtc"), "cmos_data")
    second, minute, hour, day, month, year = (int(f"{cmos[i]:x}") for i in (0, 2, 4, 7, 8, 9))
    assert (second, minute, hour) == (shown["tm_sec"], shown["tm_min"], shown["tm_hour"])
    assert (day, month - 1, year) == (shown["tm_mday"], shown["tm_mon"], shown["tm_year"] - 100)
    assert second >= 41


def test_interrupt_controller_is_as_qemu_shows_it(lab: Lab) -> None:
    """Each entry of the redirection table, and the identity of the controller."""
    source, checkpoint = saved(lab, "-machine pc -nodefaults")
    shown = source.qemu.hmp("info pic")
    pins = re.findall(r"pin \d+ +0x(\w{16})", shown)
    ioapic = state_of(checkpoint, "ioapic")
    assert [f"{entry:016x}" for entry in values(ioapic, "ioredtbl")] == pins
    assert f"id=0x{value(ioapic, 'id'):02x}" in shown


NETWORK = "-netdev hubport,id=n0,hubid=0 -netdev hubport,id=n1,hubid=0"
CARDS = "-device virtio-net-pci,netdev=n0 -device e1000,netdev=n1,mac=52:54:00:fe:dc:ba"
PCI_MACHINES = [
    pytest.param(f"-machine pc {NETWORK} {CARDS} -vga std", id="pc"),
    pytest.param(f"-machine q35 {NETWORK} {CARDS} -device qemu-xhci -device ich9-ahci", id="q35"),
]


@pytest.mark.parametrize("machine", PCI_MACHINES)
def test_configuration_of_each_pci_device_is_what_the_bus_reads(lab: Lab, machine: str) -> None:
    """256 bytes of every function, read from the source through the ports of its host bridge."""
    source, checkpoint = saved(lab, machine + " -nodefaults")
    shown = source.qemu.hmp("info pci")
    functions = re.findall(r"Bus +0, device +(\d+), function (\d):", shown)
    assert len(functions) >= 6
    saved_at = {
        f"0000:00:{int(device):02x}.{function}": config_of(checkpoint, int(device), int(function))
        for device, function in functions
    }
    read = {
        f"0000:00:{int(device):02x}.{function}": read_config(source, int(device), int(function))
        for device, function in functions
    }
    assert saved_at == read


def config_of(checkpoint: vmferry.Checkpoint, device: int, function: int) -> str:
    """The first 256 bytes of a function's configuration, in its section."""
    name = f"0000:00:{device:02x}.{function}"
    # The host bridge of q35 has a section that is not named for its place.
    pattern = "mch" if name == "0000:00:00.0" and not find(checkpoint, f"{name}/*") else f"{name}/*"
    for state in find(checkpoint, pattern):
        for _, node in state.walk():
            if node.type == "pci config" and isinstance(node, Raw):
                return node.data[:256].hex()
            if node.type == "virtio" and isinstance(node, Raw):
                return node.data[4 : 4 + 256].hex()  # behind its version
    return "not found"


def find(checkpoint: vmferry.Checkpoint, pattern: str) -> list[DeviceState]:
    return list(checkpoint.survey().states(pattern))


def read_config(vm: Vm, device: int, function: int) -> str:
    """The same, word by word through the ports 0xcf8 and 0xcfc."""
    words = []
    for register in range(0, 256, 4):
        address = 1 << 31 | device << 11 | function << 8 | register
        vm.qemu.hmp(f"o/4 0xcf8 {address:#x}")
        words.append(int(vm.qemu.hmp("i/4 0xcfc").split("=")[1], 16).to_bytes(4, "little"))
    return b"".join(words).hex()


def test_addresses_of_network_cards_are_those_that_qemu_shows(lab: Lab) -> None:
    """The registers of an e1000 and the configuration of a virtio-net hold their addresses."""
    source, checkpoint = saved(lab, f"-machine pc -nodefaults {NETWORK} {CARDS}")
    shown = dict(re.findall(r"model=([\w-]+),macaddr=([\w:]+)", source.qemu.hmp("info network")))
    low, high = values(state_of(checkpoint, "*/e1000"), "mac_reg[0]")[:2]
    address = low.to_bytes(4, "little") + (high & 0xFFFF).to_bytes(2, "little")
    assert address.hex(":") == shown["e1000"]
    virtio = raw(state_of(checkpoint, "*/virtio-net"), "virtio")
    assert bytes.fromhex(shown["virtio-net-pci"].replace(":", "")) in virtio
    [receiver] = source.qemu.execute("query-rx-filter")
    assert receiver["main-mac"] == shown["virtio-net-pci"]
