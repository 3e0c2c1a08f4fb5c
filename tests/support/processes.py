"""What processes there are, and what they do."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_frozen(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def pagers(parent: int) -> list[int]:
    """The pagers that a process has started."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with suppress(OSError):  # it has ended
                fields = (directory / "stat").read_text().rpartition(")")[2].split()
                command = (directory / "cmdline").read_bytes()
                if int(fields[1]) == parent and b"postcopy.pager" in command:
                    found.append(int(directory.name))
    return found
