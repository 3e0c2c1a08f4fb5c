"""Devices of the QEMU that is installed: decoded whole, and as QEMU itself reads and shows them."""

from __future__ import annotations

import functools
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vmstate.analyze import VARIABLE, analyze, find_script
from tests.vmstate.encode import encode
from tests.vmstate.tails import MACHINES, migrated, tail_of
from vmferry.errors import PeerError
from vmferry.vmstate.decode import decode_device
from vmferry.vmstate.tree import Array, DeviceState, Elements, Node, Raw, Struct, Value

LIVE = [
    pytest.param(name, marks=pytest.mark.qemu(MACHINES[name].target), id=name)
    for name in ("microvm", "pc-2.3", "pc-many", "q35-many", "q35-running", "mac99")
]


@functools.cache
def capture(name: str) -> tuple[int, bytes]:
    """QEMU's major version and a stream of the machine *name*; made once in a test run."""
    try:
        with migrated(MACHINES[name]) as (qemu, stream):
            return qemu.execute("query-version")["qemu"]["major"], stream
    except PeerError as error:
        if re.search("nsupported machine type|not a valid device model", str(error)):
            pytest.skip(f"this QEMU cannot make the machine {name}: {error}")
        raise


def states(stream: bytes) -> Iterator[tuple[int, DeviceState]]:
    """Section number and state of each device, checked to cover its bytes."""
    tail = tail_of(stream)
    devices = tail.description.devices[tail.early_devices :]
    for device, section in zip(devices, tail.sections, strict=True):
        state = decode_device(device, section.body, section.body_offset)
        assert section.described
        assert encode(state.root) == bytes(section.body)
        yield section.number, state


@pytest.mark.parametrize("name", LIVE)
def test_all_devices_decode_whole(name: str) -> None:
    _, stream = capture(name)
    trees = [state for _, state in states(stream)]
    assert not [path for tree in trees for path, node in tree.walk() if node.name == "(rest)"]


@pytest.mark.parametrize("name", LIVE)
def test_the_tree_is_that_of_qemus_own_script(name: str, tmp_path: Path) -> None:
    script = find_script()
    if script is None:
        pytest.skip(f"{VARIABLE} does not say where analyze-migration.py is, nor to fetch it")
    version, stream = capture(name)
    if version > 8:
        pytest.skip("the script of QEMU 7.2 does not read what QEMU 9 and later send")
    (tmp_path / "stream").write_bytes(stream)
    theirs = analyze(script, tmp_path / "stream")
    differences = [
        difference
        for number, state in states(stream)
        for difference in compare(theirs[f"{state.name} ({number})"], state.root, state.name)
    ]
    assert differences == []


def compare(theirs: Any, node: Node, path: str) -> Iterator[str]:
    """Where the script's tree differs from ours.

    The script shows numbers as ``0x`` and hexadecimal digits, other bytes as pairs of digits; it
    knows neither timers nor lists, and types that it does not know are bytes.
    """
    match node:
        case Struct() if isinstance(theirs, dict):
            fields = {field.name: field for field in node.fields}
            if fields.keys() != theirs.keys():
                yield f"{path}: {sorted(fields.keys() ^ theirs.keys())}"
            for name in fields.keys() & theirs.keys():
                yield from compare(theirs[name], fields[name], f"{path}.{name}")
        case Elements(items=items) if isinstance(theirs, list):
            if len(items) != len(theirs):
                yield f"{path}: {len(theirs)} elements, not {len(items)}"
            for index, (other, item) in enumerate(zip(theirs, items, strict=False)):
                yield from compare(other, item, f"{path}[{index}]")
        case Array() | Raw() | Value() | Struct() | Elements():
            shown = theirs if isinstance(theirs, list) else [theirs]
            if b"".join(map(_bytes, shown)) != encode(node):
                yield f"{path}: {theirs}, not {encode(node).hex(' ')}"


def _bytes(shown: Any) -> bytes:
    if isinstance(shown, bool):
        return bytes([shown])
    if shown.startswith("0x"):
        return bytes.fromhex(shown[2:].split()[0])
    return bytes.fromhex(shown)


@pytest.mark.qemu
def test_registers_are_those_that_qemu_shows() -> None:
    with migrated(MACHINES["q35-running"]) as (qemu, stream):
        shown = qemu.hmp("info registers -a")
    cpus = [state for _, state in states(stream) if state.name == "cpu"]
    assert len(cpus) == 2
    blocks = shown.split("CPU#")[1:]
    for cpu, block in zip(cpus, blocks, strict=True):
        expected = {name: int(value, 16) for name, value in re.findall(r"(\w+) ?=(\w+)", block)}
        names = ["EAX", "ECX", "EDX", "EBX", "ESP", "EBP", "ESI", "EDI"]
        if "RAX" in expected:
            names = [name.replace("E", "R", 1) for name in names]
        registers = _values(cpu["env.regs"])
        assert registers[:8].tolist() == [expected[name] for name in names]
        pointer = cpu["env.eip"]
        assert isinstance(pointer, Value)
        assert pointer.value == expected["RIP" if "RIP" in expected else "EIP"]
        control = cpu["env.cr[0]"]
        assert isinstance(control, Value)
        assert control.value == expected["CR0"]


def _values(node: Node) -> array[int]:
    assert isinstance(node, Array)
    return node.values
