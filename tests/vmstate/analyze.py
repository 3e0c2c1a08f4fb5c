"""QEMU's own scripts, as a second opinion; they do not ship with vmferry.

The environment variable VMFERRY_ANALYZE_MIGRATION names ``scripts/analyze-migration.py``, beside
which the others lie, or says ``fetch``: then they are taken from Debian's source package.  Once
fetched, for use in several runs: ``python -m tests.vmstate.analyze DIRECTORY`` prints the path for
the variable.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.qemu_source import fetch

VARIABLE = "VMFERRY_ANALYZE_MIGRATION"

ANALYZE = "analyze-migration.py"
CHECKER = "vmstate-static-checker.py"


def find_script(name: str = ANALYZE) -> Path | None:
    """A script, or ``None`` where nobody says where it is; fetched where that is asked for."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return None
    path = (_fetched() if wanted == "fetch" else Path(wanted)).with_name(name)
    return path if path.exists() else None


@functools.cache
def _fetched() -> Path:
    return fetch_scripts(Path(tempfile.mkdtemp(prefix="vmferry-analyze-")))


def fetch_scripts(directory: Path) -> Path:
    """Take the scripts from Debian's source package; leaves nothing else in *directory*."""
    fetch(directory, *(f"scripts/{name}" for name in (ANALYZE, CHECKER)))
    return directory / ANALYZE


def analyze(script: Path, stream: Path) -> dict[str, Any]:
    """What the script makes of a stream: a tree for each section, by name and section number."""
    done = subprocess.run(
        [sys.executable, str(script), "-f", str(stream), "-d", "state"],
        capture_output=True,
        check=True,
    )
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


if __name__ == "__main__":
    print(fetch_scripts(Path(sys.argv[1])))  # noqa: T201
