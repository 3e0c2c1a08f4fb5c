"""The memory of a checkpoint, page by page against what QEMU's own ``pmemsave`` writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

import vmferry
from tests.interop.lab import PC, Lab, Vm
from tests.support.capture import Scenario

pytestmark = pytest.mark.qemu

PAGE = 4096

MACHINES = [
    pytest.param("-machine pc -nodefaults -device VGA -device e1000", id="pc"),
    pytest.param("-machine q35 -nodefaults -device VGA -device virtio-net-pci", id="q35"),
    pytest.param("-machine microvm -nodefaults -device virtio-rng-device", id="microvm"),
]


@dataclass(frozen=True)
class Range:
    """Guest-physical addresses behind which a RAM block lies."""

    start: int
    end: int
    region: str
    offset: int


def ranges(vm: Vm) -> Iterator[Range]:
    """Where the processor sees memory, as ``info mtree -f`` says."""
    [view] = [v for v in vm.qemu.hmp("info mtree -f").split("FlatView") if '"cpu-memory-0"' in v]
    line = r"^  (\w{16})-(\w{16}) \(prio \d+, (?:ram|rom|romd)\): (\S+)(?: @(\w{16}))?"
    for start, last, region, offset in re.findall(line, view, re.MULTILINE):
        yield Range(int(start, 16), int(last, 16) + 1, region, int(offset or "0", 16))


def content_of(checkpoint: vmferry.Checkpoint, region: str) -> np.ndarray:
    """The bytes of the block that is named as a memory region, or as a device's region."""
    names = [b for b in checkpoint.blocks if b.name == region or b.name.endswith("/" + region)]
    [stored] = [checkpoint.memory(block) for block in names]
    assert stored is not None
    return np.fromfile(stored.path, np.uint8)


@pytest.mark.parametrize("machine", MACHINES)
def test_every_page_that_the_processor_sees_is_saved_as_it_is(lab: Lab, machine: str) -> None:
    """RAM, ROM and video memory of the stopped source are those of the checkpoint."""
    scenario = replace(PC, machine=tuple(machine.split()))
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    seen: dict[str, int] = {}
    for part in ranges(source):
        dump = source.qemu.directory / "part"
        source.qemu.save_memory(dump, part.start, part.end - part.start)
        expected = np.fromfile(dump, np.uint8).reshape(-1, PAGE)
        saved = content_of(checkpoint, part.region)
        found = saved[part.offset : part.offset + expected.size].reshape(-1, PAGE)
        wrong = np.flatnonzero((expected != found).any(axis=1))
        assert wrong.tolist() == [], part
        seen[part.region] = seen.get(part.region, 0) + expected.size
    assert_all_seen(scenario, seen)


def assert_all_seen(scenario: Scenario, seen: dict[str, int]) -> None:
    """Nothing was left out but the main memory behind the video window."""
    microvm = "microvm" in scenario.machine
    main = seen["microvm.ram" if microvm else "pc.ram"]
    assert main == scenario.ram_size - (0x10000 if microvm else 0x20000)
    assert seen["pc.bios"] >= 0x10000
    assert seen.get("vga.vram") == (None if microvm else 16 << 20)
