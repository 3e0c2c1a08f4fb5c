"""The JSON of ``inspect`` against its documentation, for every stream there is a recording of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import vmferry as package
from tests.cli import schema
from tests.cli.command import vmferry
from tests.support.recorded import manifest, recorded
from vmferry.errors import PeerError, StreamError, TruncatedStream

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("name", list(manifest()["streams"]))
def test_every_recorded_stream_fits_the_schema(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(recorded(name)[0].sent)
    content = json.loads(json.dumps(package.open_stream(path, partial=True).to_json()))
    schema.SURVEY(content, name)
    assert content["size"] + content["trailing"] == path.stat().st_size
    for block in content["ram"]:
        pages = block["data_pages"] + block["zero_pages"] + block["unsent_pages"]
        assert pages * content["page_size"] == block["size"]


def test_command_writes_the_same(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded("q35-devices")[0].sent)
    done = vmferry("inspect", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    schema.INSPECT(content, "inspect")
    assert content == package.open_stream(path).to_json() | {"verified": False}


def test_parts_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc")[0].sent)
    content = json.loads(vmferry("inspect", path, "--json", "--device", "cpu", "--ram").stdout)
    schema.INSPECT(content, "inspect")
    assert "sections" not in content
    assert [device["name"] for device in content["devices"]] == ["cpu"]
    assert len(content["ram"]) == 6


def test_broken_stream_has_its_error_in_it(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc")[0].sent[:5000])
    done = vmferry("inspect", path, "--json")
    assert done.returncode == 3
    content = json.loads(done.stdout)
    schema.INSPECT(content, "inspect")
    assert content["error"]["kind"] == "TruncatedStream"
    assert done.stderr == f"vmferry: {content['error']['message']}\n"


def test_checkpoint_fits_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(recorded("pc-block")[0].sent)
    package.receive(f"file:{path}", tmp_path / "saved").close()
    content = json.loads(vmferry("inspect", tmp_path / "saved", "--json", "--verify").stdout)
    schema.INSPECT(content, "inspect")
    assert content["verified"]
    assert content["created"]
    assert [disk["name"] for disk in content["disks"]] == ["disk0", "disk1"]


def test_error_is_plain_data() -> None:
    assert PeerError("no").to_json() == {"kind": "PeerError", "message": "no"}
    error = TruncatedStream("a page", "nothing", channel="main", offset=7, section="ram")
    content = error.within(block="pc.ram").to_json()
    schema.error(content, "error")
    assert content["message"] == str(error)
    assert (content["offset"], content["block"]) == (7, "pc.ram")
    assert isinstance(error, StreamError)


def test_every_key_is_documented() -> None:
    text = (DOCS / "inspect-json.md").read_text()
    keys: set[str] = set(schema.HEAD) | set(schema.PARTS)
    keys |= set(schema._PROGRESS) | set(schema._MOVED) | set(schema._CONVERTED)
    keys |= set(schema._STREAM_ERROR) | set(schema.NODES) | {"hex", "items", "fields", "note"}
    assert not [key for key in keys if f"`{key}`" not in text]


def test_every_key_of_migrations_is_documented() -> None:
    text = (DOCS / "operating.md").read_text()
    keys = {*schema.MIGRATION, *schema.MACHINE, "target", "state", "reason", "message", "address"}
    assert not [key for key in keys if f"`{key}`" not in text]
