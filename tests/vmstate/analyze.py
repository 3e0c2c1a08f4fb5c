"""QEMU's own ``scripts/analyze-migration.py``, as a second opinion; it does not ship with vmferry.

The environment variable VMFERRY_ANALYZE_MIGRATION names it, or says ``fetch``: then it is taken
from Debian's source package of QEMU 7.2 with apt, into a directory of its own, and nothing of the
system changes.  That reads 34 MB from the mirror and takes some seconds.  Once fetched, for use in
several runs: ``python -m tests.vmstate.analyze DIRECTORY`` prints the script's path.
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
_MEMBER = "*/scripts/analyze-migration.py"


@functools.cache
def find_script() -> Path | None:
    """The script, or ``None`` where nobody says where it is; fetched where that is asked for."""
    wanted = os.environ.get(VARIABLE)
    if wanted == "fetch":
        return fetch_script(Path(tempfile.mkdtemp(prefix="vmferry-analyze-")))
    return Path(wanted) if wanted else None


def fetch_script(directory: Path) -> Path:
    """Take the script from Debian's source package; leaves nothing else in *directory*."""
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
        _run(
            "tar", "-xf", archive.name, "--wildcards", "--strip-components=2", _MEMBER, cwd=scratch
        )
        return Path(scratch, "analyze-migration.py").rename(directory / "analyze-migration.py")


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
    print(fetch_script(Path(sys.argv[1])))  # noqa: T201
