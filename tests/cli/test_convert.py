"""``convert``: the forms, and what it says of them; what is in them is tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmferry as package
from tests.cli import schema
from tests.cli.command import vmferry
from tests.support.recorded import recorded


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc")[0].sent)
    return path


@pytest.mark.parametrize(
    ("form", "magic"), [("raw", b""), ("elf-core", b"\x7fELF"), ("stream", b"QEVM")]
)
def test_each_form_is_written(form: str, magic: bytes, stream: Path) -> None:
    out = stream.with_name("out")
    done = vmferry("convert", stream, "--to", form, out)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith(f"wrote {out} ({form})")
    with out.open("rb") as file:
        assert file.read(4).startswith(magic)
    assert sorted(path.name for path in stream.parent.iterdir()) == ["out", "stream"]


def test_checkpoint_becomes_the_stream_it_was(stream: Path) -> None:
    saved, out = stream.with_name("saved"), stream.with_name("out")
    package.receive(f"file:{stream}", saved).close()
    done = vmferry("convert", saved, "--to", "stream", out, "--json")
    assert done.returncode == 0
    events = [json.loads(line) for line in done.stdout.splitlines()]
    for event in events:
        schema.event(event, event["event"])
    assert events[-1]["target"] == str(out)
    before, after = (list(package.open_stream(path).states()) for path in (stream, out))
    assert [state.name for state in after] == [state.name for state in before]


def test_file_that_exists_is_not_touched(stream: Path) -> None:
    out = stream.with_name("out")
    out.write_text("precious")
    done = vmferry("convert", stream, "--to", "raw", out)
    assert done.returncode == 5
    assert done.stderr == f"vmferry: {out}: exists already; choose a new name\n"
    assert out.read_text() == "precious"


@pytest.mark.parametrize("form", ["raw", "stream"])
def test_background_snapshot_is_accepted_by_name(form: str, stream: Path) -> None:
    stream.write_bytes(recorded("pc-background-snapshot")[0].sent)
    out = stream.with_name("out")
    refused = vmferry("convert", stream, "--to", form, out)
    assert refused.returncode == 3
    assert "accept it with no-end" in refused.stderr
    done = vmferry("convert", stream, "--to", form, out, "--accept", "no-end")
    assert (done.returncode, done.stderr) == (0, "")


def test_machine_of_unknown_layout_is_refused(stream: Path) -> None:
    stream.write_bytes(recorded("ppc-g3beige")[0].sent)
    done = vmferry("convert", stream, "--to", "raw", stream.with_name("out"), "--json")
    assert done.returncode == 2
    assert done.stderr == (
        'vmferry: the layout of the memory of machine "g3beige" is not known;'
        " in a checkpoint each block of memory is a plain file of its own\n"
    )
    result = json.loads(done.stdout.splitlines()[-1])
    schema.event(result, "result")
    assert result["error"]["kind"] == "UsageError"
    assert [path.name for path in stream.parent.iterdir()] == ["stream"]
