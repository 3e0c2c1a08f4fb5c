"""Where temporary files go, and what machine this is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Unmeasured
from vmferry.qemu.process import find_qemu

_MEMORY = Path("/dev/shm")
_NEEDED = 6 << 30
"""Bytes that the largest files at one time take, with room to spare."""


@dataclass(frozen=True, slots=True)
class Places:
    """Directories that are removed in the end; ``None`` where there is no such file system.

    ``work`` is for what should cost nothing: in memory where that is big enough.
    """

    work: Path
    memory: Path | None
    disk: Path | None


@contextmanager
def places() -> Iterator[Places]:
    """Make the directories."""
    memory = _MEMORY if _fits(_MEMORY) and file_system(_MEMORY) == "tmpfs" else None
    temporary = [Path(tempfile.gettempdir()), Path("/var/tmp")]
    disk = next((p for p in temporary if _fits(p) and file_system(p) != "tmpfs"), None)
    work = memory or disk
    if work is None:
        raise Unmeasured(f"no directory has {_NEEDED >> 30} GiB free; set TMPDIR to one")
    made = {p: Path(tempfile.mkdtemp(prefix="vmferry-bench-", dir=p)) for p in {memory, disk} if p}
    try:
        yield Places(made[work], memory and made[memory], disk and made[disk])
    finally:
        for path in made.values():
            shutil.rmtree(path, ignore_errors=True)


def _fits(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK) and shutil.disk_usage(path).free >= _NEEDED


def file_system(path: Path) -> str:
    """The type of the file system that *path* is on, such as ``ext4``."""
    found = (0, "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount = Path(line.split()[4])
        if path.resolve().is_relative_to(mount):
            found = max(found, (len(mount.parts), line.split(" - ")[1].split()[0]))
    return found[1]


def machine(where: Places) -> dict[str, Any]:
    """What the figures depend on; nothing that names this machine."""
    facts = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    cpu = {key.strip(): value.strip() for key, value in facts.items()}
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)),
        "virtual": "hypervisor" in cpu.get("flags", "").split(),
        "kernel": platform.release().split("-")[0],
        "file_systems": [file_system(p) for p in (where.memory, where.disk) if p],
        "qemu": _qemu_version(),
        "python": platform.python_version(),
    }


def _qemu_version() -> str | None:
    try:
        command = [find_qemu(), "--version"]
    except Exception:  # noqa: BLE001 - the rows that need it say so
        return None
    shown = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return shown.stdout.splitlines()[0].removeprefix("QEMU emulator version ")
