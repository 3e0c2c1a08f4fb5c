"""Trees of values: found by path, walked, turned into JSON."""

from __future__ import annotations

import json
from array import array

import pytest

from vmferry.errors import UsageError
from vmferry.vmstate.tree import Array, DeviceState, Elements, Raw, Struct, Value

X = Value("env.x", "uint8", 8, 1, 7)
LVT = Array("lvt", "uint32", 0, 8, array("I", [1, 2]))
IRQ = Struct("apic", "struct", 0, 8, "apic", 3, (LVT,))
DOTTED = Value("cpus[0].halted", "bool", 10, 1, True)
CPUS = Elements("cpus", "struct", 9, 1, (Struct("cpus", "struct", 9, 1, "cpu", 1, ()),))
TIMER = Value("timer", "timer", 11, 8, None, "not armed")
CONFIG = Raw("config[1]", "virtio", 19, 2, b"\0\xff", "opaque")
SUB = Struct("dev/sub", "subsection", 21, 12, "dev/sub", 1, (Raw("b", "buffer", 33, 0, b""),))
ROOT = Struct("dev", "device", 0, 33, "dev", 2, (IRQ, X, CPUS, DOTTED, TIMER, CONFIG, SUB))
STATE = DeviceState("0000:00:01.0/dev", 0, ROOT)

PATHS = {
    "apic": IRQ,
    "apic.lvt": LVT,
    "env.x": X,
    "cpus": CPUS,
    "cpus[0]": CPUS.items[0],
    "cpus[0].halted": DOTTED,
    "timer": TIMER,
    "config[1]": CONFIG,
    "dev/sub": SUB,
    "dev/sub.b": SUB.fields[0],
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_to_its_node(path: str) -> None:
    assert STATE.get(path) is PATHS[path]
    assert STATE[path] is PATHS[path]


def test_walking_gives_every_path_once_and_in_order() -> None:
    assert dict(STATE.walk()) == PATHS
    assert [path for path, _ in STATE.walk()] == list(PATHS)


@pytest.mark.parametrize(
    "path",
    ["", "x", "apic.", "apic.lvt[0]", "apic.nope", "cpus[1]", "cpus[x]", "cpus[0", "cpus[-1]",
     "cpus[0]x", "env", "timer.x", "apicx"],
)  # fmt: skip
def test_a_path_to_nowhere_is_none_or_an_error(path: str) -> None:
    assert STATE.get(path) is None
    with pytest.raises(UsageError, match="no field"):
        STATE[path]


def test_json_is_plain_data() -> None:
    data = json.loads(json.dumps(STATE.to_json()))
    assert (data["name"], data["instance"]) == ("0000:00:01.0/dev", 0)
    root = data["state"]
    assert {key: root[key] for key in root if key != "fields"} == {
        "kind": "struct",
        "name": "dev",
        "type": "device",
        "offset": 0,
        "size": 33,
        "vmsd": "dev",
        "version": 2,
    }
    apic, x, cpus, _, timer, config, sub = root["fields"]
    place = {"name": "lvt", "type": "uint32", "offset": 0, "size": 8}
    assert apic["fields"] == [{"kind": "array", "values": [1, 2]} | place]
    assert (x["kind"], x["value"], "note" in x) == ("value", 7, False)
    assert cpus["items"][0]["kind"] == "struct"
    assert (timer["value"], timer["note"]) == (None, "not armed")
    assert (config["hex"], config["reason"]) == ("00ff", "opaque")
    assert "reason" not in sub["fields"][0]
