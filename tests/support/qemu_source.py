"""Files of QEMU's sources, for comparison alone; they do not ship with vmferry.

They are taken from Debian's source package of QEMU 7.2 with apt, into a directory of their own, and
nothing of the system changes.  That reads 34 MB from the mirror and takes some seconds.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

_SOURCES = """\
Types: deb-src
URIs: {mirror}
Suites: {release}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""


def fetch(directory: Path, *names: str) -> None:
    """Put files of the source tree, such as ``scripts/qemu-gdb.py``, into *directory* itself."""
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
        unpack = ("tar", "-xf", archive.name, "--wildcards", "--strip-components=1")
        _run(*unpack, *(f"*/{name}" for name in names), cwd=scratch)
        for name in names:
            Path(scratch, name).rename(directory / Path(name).name)


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
