"""Dumps of the QEMU that is installed: against each other, against its streams, and against what
QEMU's own checker says of them.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vmstate.analyze import CHECKER, VARIABLE, find_script
from tests.vmstate.schemas import Json
from tests.vmstate.tails import tail_of
from tests.vmstate.test_with_qemu import capture
from vmferry.qemu import find_qemu
from vmferry.vmstate.schema import Direction, Kind, check, check_stream, parse_schema

PC = "pc-i440fx-7.2"
OTHERS = ["pc-i440fx-2.4", "pc-i440fx-4.0", "pc-q35-7.2", "microvm", "isapc"]

pytestmark = pytest.mark.qemu


@functools.cache
def dumped(machine: str, target: str = "x86_64") -> bytes:
    """What QEMU dumps for a machine type."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "dump")
        command = [find_qemu(target), "-machine", machine, "-nodefaults", "-dump-vmstate", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this QEMU does not dump {machine}: {done.stderr.strip()[-200:]}")
        return path.read_bytes()


def dump_of(machine: str, target: str = "x86_64") -> Json:
    content: Json = json.loads(dumped(machine, target))
    return content


def breaking(old: Json, new: Json, direction: Direction) -> set[str]:
    """The devices that break, as we say."""
    schemas = [parse_schema(json.dumps(dump).encode()) for dump in (old, new)]
    return {
        finding.device
        for finding in check(*schemas)
        if finding.breaks and finding.direction is direction
    }


def theirs(old: Json, new: Json, direction: Direction, directory: Path) -> dict[str, str]:
    """The devices that break, and why, as QEMU's checker says."""
    script = find_script(CHECKER)
    if script is None:
        pytest.skip(f"{VARIABLE} does not say where {CHECKER} is, nor to fetch it")
    paths = directory / "old.json", directory / "new.json"
    for path, dump in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(dump))
    command = [sys.executable, str(script), "-s", str(paths[0]), "-d", str(paths[1])]
    if direction is Direction.NEW_TO_OLD:
        command.append("--reverse")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("Warning: ")]
    assert bool(done.returncode) == bool(lines)
    return {re.findall(r'^Section "([^"]+)"', line)[0]: line for line in lines}


@pytest.mark.parametrize("machine", OTHERS)
def test_machine_types_of_one_qemu_declare_the_same(machine: str) -> None:
    old, new = (parse_schema(dumped(name)) for name in (machine, PC))
    assert len(new.devices) > 100
    assert check(old, new) == []


@pytest.mark.parametrize("name", ["microvm", "pc-many", "q35-many"])
def test_streams_load_in_the_qemu_that_made_them(name: str) -> None:
    description = tail_of(capture(name)[1]).description
    findings = check_stream(description, parse_schema(dumped("none")))
    assert not [finding for finding in findings if finding.breaks]
    judged = len(description.devices) - sum(finding.kind is Kind.NOT_JUDGED for finding in findings)
    assert judged > 3


def test_streams_of_another_version_are_refused() -> None:
    dump = dump_of("none")
    description = tail_of(capture("q35-many")[1]).description
    for device in dump.values():
        if "Description" in device:
            device["Description"]["minimum_version_id"] += 20_000
            device["Description"]["version_id"] += 20_000
    findings = check_stream(description, parse_schema(json.dumps(dump).encode()))
    assert {finding.kind for finding in findings} == {Kind.VERSION_TOO_OLD, Kind.NOT_JUDGED}


# What can become of a device: each changes its description in place, or returns False


def fields_of(state: Json) -> list[Json]:
    found: list[Json] = state.get("Fields", [])
    return found


def plain(state: Json) -> list[Json]:
    """Fields that are nothing special."""
    names = [field["field"] for field in fields_of(state)]
    return [
        field
        for field in fields_of(state)
        if "Description" not in field
        and not field["field_exists"]
        and names.count(field["field"]) == 1
        and field["field"] != "unused"
        and field["size"]
    ]


def nested(state: Json) -> Json | None:
    """A struct with fields."""
    for field in fields_of(state):
        inner: Json | None = field.get("Description")
        if inner and not field["field_exists"] and plain(inner):
            return inner
    return None


def new_field(version: int = 0, *, conditional: bool = False) -> Json:
    return {"field": "made_up", "version_id": version, "field_exists": conditional, "size": 3}


def drop(state: Json) -> bool:
    if found := plain(state):
        state["Fields"].remove(found[len(found) // 2])
    return bool(found)


def add(state: Json) -> bool:
    if found := plain(state):
        state["Fields"].insert(state["Fields"].index(found[0]), new_field())
    return bool(found)


def append(state: Json) -> bool:
    state.setdefault("Fields", []).append(new_field())
    return bool(state["Fields"][:-1]) and "Description" not in state["Fields"][-2]


def append_later(state: Json) -> bool:
    state["version_id"] += 1
    state.setdefault("Fields", []).append(new_field(state["version_id"]))
    return True


def append_conditional(state: Json) -> bool:
    state.setdefault("Fields", []).append(new_field(conditional=True))
    return True


def swap(state: Json) -> bool:
    found = plain(state)
    if len(found) > 1:
        one, other = (state["Fields"].index(field) for field in found[:2])
        state["Fields"][one], state["Fields"][other] = found[1], found[0]
    return len(found) > 1


def resize(state: Json) -> bool:
    if found := plain(state):
        found[0]["size"] += 1
    return bool(found)


def rename(state: Json) -> bool:
    if found := plain(state):
        found[-1]["field"] = "made_up"
    return bool(found)


def leave_a_gap(state: Json) -> bool:
    if found := plain(state):
        found[-1]["field"] = "unused"
    return bool(found)


def field_of_version(state: Json) -> bool:
    if found := plain(state):
        found[0]["version_id"] = state["version_id"]
    return bool(found) and state["version_id"] > 0


def raise_version(state: Json) -> bool:
    state["version_id"] += 1
    return True


def raise_minimum(state: Json) -> bool:
    state["version_id"] += 1
    state["minimum_version_id"] = state["version_id"]
    return True


def resize_nested(state: Json) -> bool:
    inner = nested(state)
    return inner is not None and resize(inner)


def append_nested(state: Json) -> bool:
    inner = nested(state)
    return inner is not None and append(inner)


def raise_nested_version(state: Json) -> bool:
    inner = nested(state)
    return inner is not None and raise_minimum(inner)


def add_subsection(state: Json) -> bool:
    sub = {"name": f"{state['name']}/made_up", "version_id": 1, "minimum_version_id": 1}
    state.setdefault("Subsections", []).append(sub)
    return len(state["Subsections"]) > 1


def add_first_subsection(state: Json) -> bool:
    return not add_subsection(state)


def raise_subsection_version(state: Json) -> bool:
    return bool(state.get("Subsections")) and raise_version(state["Subsections"][0])


def empty(state: Json) -> bool:
    return state.pop("Fields", None) is not None


CHANGES: dict[str, Callable[[Json], bool]] = {
    change.__name__: change
    for change in (
        *(drop, add, append, append_later, append_conditional, swap, resize, rename, leave_a_gap),
        *(field_of_version, raise_version, raise_minimum, resize_nested, append_nested),
        *(raise_nested_version, add_subsection, add_first_subsection, raise_subsection_version),
        empty,
    )
}

FORWARD, BACK = Direction.OLD_TO_NEW, Direction.NEW_TO_OLD

MORE = "the script does not look at fields that only the loading side has"
RENAMED = "names that the script knows for old and new ones of one field are the same to it"
EMPTY = "the script takes a missing list of fields for an error, but it is an empty one"
NAMES = "names of fields are not in the stream"
FIELDS = "a field of a version that both sides are at is there on both"
NESTED = "versions of states inside fields are not in the stream"
CONDITION = "whether a field under a condition is sent, no declaration says: we say it may break"

SILENT: dict[tuple[str, Direction], str] = {
    ("drop", BACK): MORE,
    ("append", FORWARD): MORE,
    ("append_nested", FORWARD): MORE,
    ("empty", BACK): MORE,
    ("swap", FORWARD): RENAMED,
    ("swap", BACK): RENAMED,
}
"""What we find and the script does not, and why."""

LOUD: dict[tuple[str, Direction], str] = {
    ("append_conditional", BACK): CONDITION,
    ("rename", FORWARD): NAMES,
    ("rename", BACK): NAMES,
    ("field_of_version", BACK): FIELDS,
    ("raise_nested_version", FORWARD): NESTED,
    ("raise_nested_version", BACK): NESTED,
}
"""What the script finds and we do not, and why."""


def changed(dump: Json, change: Callable[[Json], bool]) -> tuple[Json, Json]:
    """The devices that can be changed so, before and after."""
    before, after = ({"vmschkmachine": dump["vmschkmachine"]} for _ in range(2))
    for name, device in dump.items():
        new = copy.deepcopy(device)
        if "Description" in device and change(new["Description"]):
            new["version_id"] = new["Description"]["version_id"]
            new["minimum_version_id"] = new["Description"]["minimum_version_id"]
            before[name], after[name] = device, new
    return before, after


@pytest.mark.parametrize("direction", [FORWARD, BACK])
@pytest.mark.parametrize("name", CHANGES)
def test_we_agree_with_qemus_checker(name: str, direction: Direction, tmp_path: Path) -> None:
    old, new = changed(dump_of(PC), CHANGES[name])
    assert len(old) > 20
    ours, others = breaking(old, new, direction), theirs(old, new, direction, tmp_path)
    assert bool(ours - others.keys()) == ((name, direction) in SILENT)
    assert bool(others.keys() - ours) == ((name, direction) in LOUD)


def test_we_agree_with_qemus_checker_on_machine_types(tmp_path: Path) -> None:
    for machine in OTHERS:
        old, new = dump_of(machine), dump_of(PC)
        assert breaking(old, new, FORWARD) == theirs(old, new, FORWARD, tmp_path).keys() == set()


@pytest.mark.qemu("ppc64")
@pytest.mark.parametrize("direction", [FORWARD, BACK])
def test_we_agree_with_qemus_checker_on_two_builds(direction: Direction, tmp_path: Path) -> None:
    old, new = dump_of(PC), dump_of("pseries", "ppc64")
    ours, others = breaking(old, new, direction), theirs(old, new, direction, tmp_path)
    assert ours
    assert ours <= others.keys()
    # Sections go by the name of the state: a type that is not there may be another by that name.
    sender, loader = (old, new) if direction is FORWARD else (new, old)
    names = {device["Description"]["name"] for device in loader.values() if "Description" in device}
    for device in others.keys() - ours:
        assert device not in loader
        assert sender[device]["Description"]["name"] in names


def test_every_deviation_is_of_a_change_that_is_tried() -> None:
    assert {name for name, _ in SILENT | LOUD} <= CHANGES.keys()
