"""A small checkpoint that has everything a checkpoint can have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.migration.machines import PAGE_SIZE, Resting, noise
from vmferry import receive
from vmferry.migration.source import Source
from vmferry.transports import connect
from vmferry.wire.bitmap import BitmapBits, BitmapComplete, BitmapStart
from vmferry.wire.configuration import Configuration
from vmferry.wire.layout import DISK_CHUNK_SIZE, BitmapFlag

_BITMAP = ("drive0", "bitmap0", BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME)

MACHINE = Resting(
    configuration=Configuration("pc-i440fx-7.2", uuid=UUID(int=7)),
    memories={
        "pc.ram": noise(1, 300 * PAGE_SIZE) + bytes(40 * PAGE_SIZE) + noise(2, PAGE_SIZE),
        "pc.rom": bytes(4 * PAGE_SIZE),
    },
    images={"drive0": noise(3, DISK_CHUNK_SIZE) + bytes(DISK_CHUNK_SIZE)},
    bitmaps=[
        BitmapStart(*_BITMAP, 65536, True, True),
        BitmapBits(*_BITMAP, 0, 4096, b"\1" + bytes(3)),
        BitmapComplete(*_BITMAP),
    ],
)


def stream(path: Path, machine: Resting = MACHINE) -> Path:
    """The machine as a stream in the file *path*."""
    Source(machine, lambda _: connect(f"file:{path}")).run()
    return path


def save(directory: Path, machine: Resting = MACHINE) -> Path:
    """The machine as a checkpoint in *directory*, which is not there yet."""
    source = stream(directory.with_name(directory.name + ".stream"), machine)
    receive(f"file:{source}", directory).close()
    source.unlink()
    return directory


def manifest_of(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / "manifest.json").read_text())
    return content


def rewrite(directory: Path, manifest: Any) -> None:
    """Put another manifest in the place of the real one."""
    (directory / "manifest.json").write_text(json.dumps(manifest))
