"""``vmferry schema``: dump and check as processes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import vmferry as package
from tests.cli.command import COMMAND, environment, vmferry
from tests.cli.schema import Check, each, flag, obj, one_of, text
from tests.support.recorded import recorded
from tests.vmstate.schemas import Json, dump, field, state
from vmferry.vmstate.schema import Direction, Kind, Severity

DEVICES = """
from typing import Annotated
from vmferry.vmstate import U8, U16, device, since, state

@state("part")
class Part:
    x: U8 = 0

@device("serial", version=2, minimum_version=1)
class Serial:
    thr: U8 = 0
    divider: Annotated[U16, since(2)] = 0

@device("timer")
class Timer:
    count: U16 = 0

ALL = {"a": Serial, "b": Timer}
broken = 1 / 0 if __name__ == "broken" else None
"""

FINDING: dict[str, Check] = {
    "kind": one_of(*Kind),
    "severity": one_of(*Severity),
    "direction": one_of(*Direction),
    "device": text,
    "path": text,
    "expected": text,
    "found": text,
    "condition": text,
    "advice": text,
}
CONTENT = obj(
    {
        "schema": one_of(1),
        "compared": each(obj({"direction": one_of(*Direction), "from": text, "into": text})),
        "breaks": flag,
        "findings": each(obj(FINDING)),
    }
)


def written(path: Path, *states: Json) -> Path:
    path.write_text(json.dumps(dump(*states)))
    return path


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return written(tmp_path / "old.json", state("serial", field("thr")))


@pytest.fixture
def new(tmp_path: Path) -> Path:
    fields = field("thr"), field("lcr", 2, 2)
    return written(tmp_path / "new.json", state("serial", *fields, version=2))


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "schema", *arguments],
        cwd=directory,
        env=environment(PYTHONPATH=os.environ.get("PYTHONPATH", "")),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_nothing_breaks_between_a_program_and_itself(old: Path) -> None:
    done = vmferry("schema", "check", old, old)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{old} into {old}: loads\n" * 2


def test_what_breaks_is_shown_by_direction_and_device(old: Path, new: Path) -> None:
    done = vmferry("schema", "check", old, new, COLUMNS="1000")
    assert (done.returncode, done.stderr) == (1, "")
    later = "field in later version: expected it from version 2 on, found version 1"
    assert done.stdout.splitlines() == [
        f"{old} into {new}: loads (1 note)",
        "  serial",
        f"    note       serial.lcr: {later}",
        f"{new} into {old}: breaks (1 break)",
        "  serial",
        "    breaks     serial: version too new: expected at most version 1, found version 2",
        "               -> keep the version and put what is new into a subsection",
    ]


def test_direction_that_is_not_asked_for_does_not_count(old: Path, new: Path) -> None:
    done = vmferry("schema", "check", "--direction", "old-to-new", old, new)
    assert done.returncode == 0
    assert done.stdout.count(" into ") == 1
    assert vmferry("schema", "check", "--direction", "new-to-old", old, new).returncode == 1


def test_json_is_what_the_document_says(old: Path, new: Path) -> None:
    done = vmferry("schema", "check", old, new, "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    CONTENT(content, "check")
    assert content["breaks"]
    assert content["compared"][0] == {
        "direction": "old-to-new",
        "from": str(old),
        "into": str(new),
    }
    assert [finding["direction"] for finding in content["findings"]] == [
        "old-to-new",
        "new-to-old",
    ]


def test_stream_is_held_against_a_schema(tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    stream.write_bytes(recorded("pc")[0].sent)
    schema = written(tmp_path / "schema", state("i8254"))
    done = vmferry("schema", "check", "--stream", stream, schema, "--json")
    assert done.returncode == 1
    content = json.loads(done.stdout)
    CONTENT(content, "check")
    paths = {finding["path"]: finding["kind"] for finding in content["findings"]}
    assert paths["ram"] == paths["timer"] == "not-judged"
    assert paths["fw_cfg"] == "device-unknown"
    assert {finding["direction"] for finding in content["findings"]} == {"stream"}


def test_stream_may_come_from_a_pipe_or_a_checkpoint(tmp_path: Path) -> None:
    stream = tmp_path / "stream"
    stream.write_bytes(recorded("pc")[0].sent)
    package.receive(f"file:{stream}", tmp_path / "saved").close()
    schema = written(tmp_path / "schema", state("i8254"))
    shown = [
        vmferry("schema", "check", "--stream", "-", schema, "--json", stdin=stream.read_bytes()),
        vmferry("schema", "check", "--stream", tmp_path / "saved", schema, "--json"),
    ]
    assert {done.returncode for done in shown} == {1}
    piped, saved = (json.loads(done.stdout)["findings"] for done in shown)
    # A checkpoint has memory, but not as a section.
    assert [finding for finding in piped if finding["path"] != "ram"] == saved


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("check {old}", 2, "expected OLD and NEW, found 1"),
        ("check {old} {old} {old}", 2, "expected OLD and NEW, found 3"),
        ("check --stream {old} {old} {old}", 2, "expected one SCHEMA with --stream, found 2"),
        ("check {old} /nonexistent", 5, "/nonexistent: cannot be read: No such file"),
        ("check {old} {stream}", 5, "not declared state as vmferry schema dump"),
        ("check --stream {old} {old}", 3, "expected"),
        ("check --stream {postcopy} {old}", 2, "has no closing description to compare"),
        ("check --direction up {old} {old}", 2, "'up' is not one of 'both'"),
        ("dump serial", 2, 'expected MODULE:ATTR, found "serial"'),
        ("dump nowhere:x", 2, "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("dump devices:Nothing", 2, "cannot be imported: AttributeError"),
        ("dump broken:ALL", 2, "cannot be imported: ZeroDivisionError"),
        ("dump devices:Part", 2, "Part is the state of no device"),
        ("dump devices:ALL.values", 2, "found an object of type builtin_function_or_method"),
        ("dump devices:U8.__metadata__", 2, "expected classes of devices, found an object of type"),
        ("dump builtins:int", 2, "int is not declared"),
    ],
)
def test_mistakes_are_one_line(
    arguments: str, status: int, message: str, old: Path, tmp_path: Path
) -> None:
    paths = {name: tmp_path / name for name in ("stream", "postcopy")}
    paths["stream"].write_bytes(recorded("pc")[0].sent)
    paths["postcopy"].write_bytes(recorded("pc-2.2")[0].sent)
    for name in ("devices", "broken"):
        (tmp_path / f"{name}.py").write_text(DEVICES)
    done = run(tmp_path, *arguments.format(old=old, **paths).split())
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("vmferry: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_dump_of_one_device_and_of_several(tmp_path: Path) -> None:
    (tmp_path / "devices.py").write_text(DEVICES)
    one, several = (
        run(tmp_path, "dump", f"devices:{attribute}") for attribute in ("Serial", "ALL")
    )
    assert (one.returncode, one.stderr, several.returncode) == (0, "", 2)
    content: Any = json.loads(one.stdout)
    assert content["vmschkmachine"] == {"Name": "devices:Serial", "writer": "vmferry"}
    assert content["serial"]["Description"]["Fields"][1]["version_id"] == 2
    (tmp_path / "more.py").write_text("from devices import *\nALL = [*ALL.values()]\n")
    several = run(tmp_path, "dump", "more:ALL")
    assert list(json.loads(several.stdout)) == ["vmschkmachine", "serial", "timer"]


def test_what_was_dumped_is_compared(tmp_path: Path, old: Path) -> None:
    (tmp_path / "devices.py").write_text(DEVICES)
    dumped = tmp_path / "dumped.json"
    dumped.write_text(run(tmp_path, "dump", "devices:Serial").stdout)
    assert run(tmp_path, "check", str(dumped), str(dumped)).returncode == 0
    done = run(tmp_path, "check", str(old), str(dumped), "--json", "--direction", "old-to-new")
    assert [finding["kind"] for finding in json.loads(done.stdout)["findings"]] == [
        "field-in-later-version"
    ]
    assert done.returncode == 0


def test_names_cannot_move_the_cursor(tmp_path: Path, old: Path) -> None:
    bad = written(tmp_path / "bad", state("\x1b[2J"))
    done = vmferry("schema", "check", old, bad)
    assert done.returncode == 5
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["check", "dump"])
def test_help_tells_each_verb(verb: str) -> None:
    assert f"\n  {verb} " in vmferry("schema", "--help").stdout
    assert vmferry("schema", verb, "--help").stdout.startswith(f"Usage: vmferry schema {verb} ")
