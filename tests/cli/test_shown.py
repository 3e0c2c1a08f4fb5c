"""What ``inspect`` shows, letter by letter; ``VMFERRY_UPDATE=1`` accepts what it shows now."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.command import vmferry
from tests.support.recorded import recorded

SHOWN = Path(__file__).parent / "shown"


@pytest.mark.parametrize(
    ("name", "stream", "arguments"),
    [
        ("overview", "q35-devices", []),
        ("devices", "q35-devices", ["cpu:1", "hpet", "mc146818rtc", "*/virtio-rng", "PCIBUS"]),
        ("bitmaps", "pc-bitmaps", []),
        ("no-footers", "pc-2.3", []),
        ("nothing-known", "pc-2.2", []),
        ("channel", "pc-multifd", []),
        ("postcopy", "pc-postcopy", []),
        ("big-endian", "ppc-g3beige", []),
    ],
)
def test_it_is_shown_like_this(
    name: str, stream: str, arguments: list[str], tmp_path: Path
) -> None:
    patterns = [word for pattern in arguments for word in ("--device", pattern)]
    content = bytes(recorded(stream)[0].sent)
    done = vmferry("inspect", "-", *patterns, stdin=content, COLUMNS="100")
    assert (done.returncode, done.stderr) == (0, "")
    path = SHOWN / f"{name}.txt"
    if os.environ.get("VMFERRY_UPDATE"):
        path.write_text(done.stdout)
    assert done.stdout == path.read_text()
