"""The streams in tests/data: real bytes of a real QEMU, for tests that run without one."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import zstandard

from tests.support.recorder import Channel

DATA = Path(__file__).parent.parent / "data"


@functools.cache
def manifest() -> dict[str, Any]:
    """What was recorded and how; the names of the streams are the keys of ``streams``."""
    content: dict[str, Any] = json.loads((DATA / "manifest.json").read_text())
    return content


@functools.cache
def recorded(name: str) -> tuple[Channel, ...]:
    """The channels of the recording *name*, the main one first; not to be changed."""
    return tuple(
        Channel(_content(channel["sent"]), _content(channel["answered"]))
        for channel in manifest()["streams"][name]["channels"]
    )


def _content(entry: dict[str, Any] | None) -> bytearray:
    if entry is None:
        return bytearray()
    packed = (DATA / entry["file"]).read_bytes()
    content = zstandard.ZstdDecompressor().decompress(packed, max_output_size=entry["size"])
    assert hashlib.sha256(content).hexdigest() == entry["sha256"], entry["file"]
    return bytearray(content)
