"""A manifest that a stranger wrote: refused with an error of storage, or right to be used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.saved import manifest_of, rewrite, save
from tests.migration.attempts import descriptors
from vmferry import Checkpoint, CheckpointDamaged, CheckpointIncomplete, StorageError
from vmferry.checkpoint.manifest import MAX_SIZE
from vmferry.checkpoint.manifest_reader import parse_manifest
from vmferry.migration.source import Source
from vmferry.transports import connect

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "vm")


@pytest.fixture(scope="module", autouse=True)
def manifest(directory: Path) -> Manifest:
    """As it was, before any test has put another in its place."""
    return manifest_of(directory)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a tree of JSON."""
    if isinstance(node, dict):
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, list) else []
    return [path] * bool(path) + [
        way for key, child in children for way in places(child, (*path, key))
    ]


def put(manifest: Manifest, path: tuple[Any, ...], value: Any) -> Manifest:
    """A copy with another value at *path*; without it where *value* is ``...``."""
    changed = copy.deepcopy(manifest)
    node: Any = changed
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return changed


NUMBERS = [-1, 0, 1, 2, 255, 4096, 65536, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]
TEXTS = [
    "",
    "a",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "ram",
    "ram/",
    "a\0b",
    "\ud800",
    "é" * 300,
]
JUNK = st.one_of(
    st.sampled_from([..., None, True, False, [], {}, [[]], 1.5, 1e308, float("nan")]),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=10),
)


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Manifest], Manifest]:
    """One to three values replaced, by junk or by another value of the manifest."""
    choices = draw(
        st.lists(st.tuples(st.integers(0, 10**6), JUNK, st.booleans()), min_size=1, max_size=3)
    )

    def change(manifest: Manifest) -> Manifest:
        for place, junk, swap in choices:
            ways = places(manifest)
            path = ways[place % len(ways)]
            if swap:
                junk = manifest  # noqa: PLW2901
                for key in ways[(place * 7 + 1) % len(ways)]:
                    junk = junk[key]  # noqa: PLW2901
            manifest = put(manifest, path, junk)
        return manifest

    return change


def use(directory: Path, out: Path) -> None:
    """Everything that is done with a checkpoint."""
    with Checkpoint(directory) as checkpoint:
        checkpoint.survey().to_json()
        Source(checkpoint, lambda _: connect(f"file:{out}")).run()
    Checkpoint(directory, verify=True).close()


@given(mutations())
@settings(max_examples=300)
def test_any_manifest_is_refused_or_can_be_used(
    directory: Path, manifest: Manifest, change: Callable[[Manifest], Manifest]
) -> None:
    rewrite(directory, change(manifest))
    try:
        use(directory, directory.parent / "out")
    except StorageError as error:
        assert str(directory) in str(error)  # noqa: PT017


REFUSED: list[tuple[tuple[Any, ...], Any, str]] = [
    (("format",), "tar", "not the manifest of a vmferry checkpoint"),
    (("version",), 2, "a newer vmferry wrote it"),
    (("version",), True, "format version 1"),
    (("machine",), "", "machine: expected a name"),
    (("machine",), "x" * 256, "machine"),
    (("machine",), "\ud800", "machine"),
    (("page_size",), 4097, "a power of two"),
    (("page_size",), 1 << 20, "a power of two from 1024 to 65536"),
    (("page_bits",), 13, "page_bits"),
    (("uuid",), "zzz", "a UUID"),
    (("footers",), 1, "true or false"),
    (("capabilities",), ["x"] * 129, "at most 128 names"),
    (("stream_capabilities",), ["x" * 256], "at most 64 names"),
    (("ram", 0, "name"), "pc.rom", "each name once"),
    (("ram", 0, "size"), 0, "one or more pages"),
    (("ram", 0, "size"), 4097, "one or more pages"),
    (("ram", 0, "size"), 1 << 62, "one sum a page"),
    (("ram", 0, "data_pages"), 300, "zero_pages"),
    (("ram", 0, "file"), "../vm.stream", "inside the directory"),
    (("ram", 0, "file"), "/etc/passwd", "inside the directory"),
    (("ram", 0, "file"), "a/b/c", "inside the directory"),
    (("ram", 0, "file"), "ram/.", "inside the directory"),
    (("ram", 0, "sums", "sha256"), "0" * 63, "64 hexadecimal digits"),
    (("ram", 0, "page_size"), 3000, "a power of two"),
    (("disks", 0, "size"), 4096, "one or more pages of 1048576"),
    (("sections", 0, "offset"), 1, "sections"),
    (("sections", 0, "size"), 1, "sections"),
    (("sections", 0, "number"), 1 << 32, "number"),
    (("devices", "size"), 1 << 40, "at most"),
    (("description", "size"), 1 << 30, "at most"),
    (("bitmaps", "size"), 1 << 30, "at most"),
    (("created",), ..., "created"),
]


@pytest.mark.parametrize(("path", "value", "words"), REFUSED, ids=str)
def test_value_that_cannot_be_is_named(
    directory: Path, manifest: Manifest, path: tuple[Any, ...], value: Any, words: str
) -> None:
    rewrite(directory, put(manifest, path, value))
    with pytest.raises(StorageError, match=words):
        Checkpoint(directory)


NOT_MANIFESTS = {
    "empty": b"",
    "no JSON": b"{",
    "no object": b"[]",
    "a number": b"1",
    "not UTF-8": b'{"format": "\xff"}',
    "deep": b"[" * 100_000,
    "a number of many digits": b'{"version": ' + b"9" * 5000 + b"}",
    "another file": b"\x7fELF" + bytes(100),
}


@pytest.mark.parametrize("name", NOT_MANIFESTS)
def test_what_is_no_manifest_is_damaged(directory: Path, name: str) -> None:
    (directory / "manifest.json").write_bytes(NOT_MANIFESTS[name])
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
        Checkpoint(directory)


def test_manifest_that_is_too_large_is_not_read(directory: Path) -> None:
    with (directory / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointDamaged, match="larger than any manifest"):
        Checkpoint(directory)


def test_largest_manifest_is_parsed(directory: Path, manifest: Manifest) -> None:
    (section,) = manifest["sections"]
    many = manifest | {
        "sections": [section | {"offset": n * section["size"]} for n in range(32_768)],
        "devices": manifest["devices"] | {"size": 32_768 * section["size"]},
    }
    text = json.dumps(many, indent=2).encode()
    assert len(text) < MAX_SIZE / 2
    assert len(parse_manifest(text, "test").sections) == 32_768


def test_nothing_stays_open_after_a_refusal(directory: Path, manifest: Manifest) -> None:
    rewrite(directory, manifest)
    damage = directory / manifest["ram"][0]["file"]
    content = damage.read_bytes()
    damage.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    before = descriptors()
    with pytest.raises(CheckpointDamaged):
        Checkpoint(directory, verify=True)
    assert descriptors() == before
    damage.write_bytes(content)


def test_directory_without_a_manifest_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such checkpoint directory"):
        Checkpoint(tmp_path / "nothing")
    with pytest.raises(StorageError, match=r"there is no manifest\.json in it"):
        Checkpoint(tmp_path)
    (tmp_path / "manifest.json.partial").touch()
    with pytest.raises(CheckpointIncomplete, match="receive the machine again"):
        Checkpoint(tmp_path)
