"""QEMU's own script reads what declared devices are saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.vmstate.analyze import VARIABLE, analyze, find_script
from tests.vmstate.test_codec import Clock, Hooked, full
from tests.wire import described as d
from vmferry.vmstate import describe, save
from vmferry.wire.description import parse_description


def stream_of(*devices: Any) -> bytes:
    """A stream of nothing but these devices."""
    described, sections = [], b""
    for number, obj in enumerate(devices):
        state = describe(obj)
        body = save(obj)
        described.append({"name": state["vmsd_name"], "instance_id": number} | state)
        sections += d.section(
            number, state["vmsd_name"], body, instance=number, version=state["version"]
        )
    text = d.description(*described)
    assert [entry.size for entry in parse_description(text).devices] == [
        len(save(obj)) for obj in devices
    ]
    return b"QEVM\0\0\0\3" + d.tail(sections, text)


def test_the_script_of_qemu_reads_every_kind_of_field(tmp_path: Path) -> None:
    script = find_script()
    if script is None:
        pytest.skip(f"{VARIABLE} does not say where analyze-migration.py is, nor to fetch it")
    (tmp_path / "stream").write_bytes(stream_of(full(), Clock(), Hooked()))
    tree = analyze(script, tmp_path / "stream")
    clock = tree["timer (0)"]
    assert clock["channels"][3] == {"mode": "0x03", "count": "0x0006"}
    assert clock["some"] == ["0x0001", "0x0002"]
    assert clock["pointers"][1] == {"mode": "0x01", "count": "0x0001"}
    assert clock["timer/extra"] == {"a": "0x01", "b": "0x02"}
    assert clock["timer/more"] == {"z": "0x08"}
    assert tree["timer (1)"]["late"] == "0x00"
    assert tree["hooked (2)"]["part"] == {"x": "0x01"}
