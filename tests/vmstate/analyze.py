"""QEMU's own scripts, as a second opinion; they do not ship with vmferry.

The environment variable VMFERRY_ANALYZE_MIGRATION names ``scripts/analyze-migration.py``, beside
which the others lie, or says ``fetch``: then they are taken from Debian's source package of QEMU
7.2 with apt, into a directory of their own, and nothing of the system changes.  That reads 34 MB
from the mirror and takes some seconds.  Once fetched, for use in several runs:
``python -m tests.vmstate.analyze DIRECTORY`` prints the path for the variable.
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

VARIABLE = "VMFERRY_ANALYZE_MIGRATION"

_SOURCES = """\
Types: deb-src
URIs: {mirror}
Suites: {release}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
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
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        parts, lists = Path(scratch, "parts"), Path(scratch, "lists", "partial")
        parts.mkdir()
        lists.mkdir(parents=True)
        (parts / "qemu.sources").write_text(_sources())
        options = [
            *("-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={parts}"),
            *("-o", f"Dir::State::Lists={lists.parent}", "-o", f"Dir::Cache={scratch}"),
            *("-o", "APT::Sandbox::User="),
        ]
        _run("apt-get", *options, "-q", "update", cwd=scratch)
        _run("apt-get", *options, "-q", "source", "--tar-only", "qemu", cwd=scratch)
        (archive,) = Path(scratch).glob("qemu_*.orig.tar.*")
        names = (ANALYZE, CHECKER)
        members = [f"*/scripts/{name}" for name in names]
        unpack = ("tar", "-xf", archive.name, "--wildcards", "--strip-components=2")
        _run(*unpack, *members, cwd=scratch)
        for name in names:
            Path(scratch, name).rename(directory / name)
        return directory / ANALYZE


def _sources() -> str:
    """The sources of the release and mirror that this machine takes its packages from."""
    form = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    targets = _run("apt-get", "indextargets", "--format", form, "Created-By: Packages").split("\n")
    found = [target.split() for target in targets if target.endswith(" main")]
    mirror, release, _ = min(found, key=lambda target: len(target[1]))
    return _SOURCES.format(mirror=mirror, release=release)


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


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
