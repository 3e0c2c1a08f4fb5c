"""docs/checkpoint.md says what a manifest holds: all of it, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import vmferry
from tests.support.recorded import recorded

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoint.md"


@pytest.fixture
def manifest(tmp_path: Path) -> dict[str, object]:
    """The manifest of a recorded machine with disks."""
    (channel,) = recorded("pc-block")
    (tmp_path / "stream").write_bytes(channel.sent)
    with vmferry.receive(f"file:{tmp_path / 'stream'}", tmp_path / "vm"):
        loaded: dict[str, object] = json.loads((tmp_path / "vm" / "manifest.json").read_text())
        return loaded


def documented(heading: str) -> set[str]:
    """The keys in the first table behind *heading*."""
    text = DOCUMENT.read_text(encoding="utf-8")
    table = re.search(r"(?:^\|.*\n)+", text[text.index(heading) :], re.MULTILINE)
    assert table is not None
    rows = table[0].splitlines()[2:]
    return {key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])}


def test_every_key_of_a_manifest_is_documented(manifest: dict[str, object]) -> None:
    assert documented("## manifest.json") == set(manifest)


def test_every_key_of_a_block_is_documented(manifest: dict[str, object]) -> None:
    (block, *_) = manifest["ram"]  # type: ignore[misc]
    assert documented("An entry of `ram`") == set(block)


@pytest.mark.parametrize("entries", ["disks", "sections"])
def test_keys_of_other_entries_are_named(manifest: dict[str, object], entries: str) -> None:
    (first, *_) = manifest[entries]  # type: ignore[misc]
    text = DOCUMENT.read_text(encoding="utf-8")
    assert {key for key in first if f"`{key}`" not in text} == set()
