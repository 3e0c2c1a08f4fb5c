"""A Linux guest: a kernel of Debian's, a shell on the serial port, and data that it can check.

``scripts/setup linux`` fetches the kernel and the shell.  In the guest a file system in memory has
a file of noise and its checksum, and a process adds up numbers that it holds, again and again.
"""

from __future__ import annotations

import gzip
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guests.serial import GuestError

PLACE = Path(
    os.environ.get("VMFERRY_LINUX") or Path(__file__).resolve().parent.parent / "build" / "linux"
)
"""A directory with ``vmlinuz`` and ``busybox``, which is linked statically."""

NUMBERS = 20_000
SUM = sum(n * 7919 % 100_003 for n in range(NUMBERS))

_READY = "the shell is ready"

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t devtmpfs none /dev
mount -t tmpfs -o size=80% none /tmp
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo
dd if=/dev/urandom of=/tmp/data bs=1M count=$data 2>/dev/null
sha256sum /tmp/data >/tmp/sum
awk 'BEGIN {{
    for (i = 0; i < {NUMBERS}; i++) held[i] = i * 7919 % 100003
    while (1) {{
        sum = 0
        for (i in held) sum += held[i]
        print ++passes, sum >"/tmp/passes"
        fflush("/tmp/passes")
    }}
}}' &
until [ -s /tmp/passes ]; do sleep 0.1; done
export PS1=
echo {_READY}
exec sh 2>/dev/null
"""


def lacks() -> str | None:
    """Why there is no such guest here; ``None`` where there is."""
    if all((PLACE / name).exists() for name in ("vmlinuz", "busybox")):
        return None
    return f"there is no Linux in {PLACE}: scripts/setup linux"


@dataclass(frozen=True, slots=True)
class LinuxGuest:
    """A guest of *memory* MiB, *data* of them checked."""

    memory: int
    data: int

    def arguments(self, directory: Path) -> list[str]:
        """QEMU's arguments; writes the guest's first file system to *directory*."""
        initrd = directory / "initrd"
        initrd.write_bytes(gzip.compress(b"".join(_archive()), 1, mtime=0))
        options = f"console=ttyS0 quiet panic=-1 mitigations=off data={self.data}"
        return [
            *("-machine", "q35,accel=tcg", "-nodefaults", "-no-reboot", "-m", f"{self.memory}M"),
            *("-kernel", str(PLACE / "vmlinuz"), "-initrd", str(initrd), "-append", options),
        ]


class Shell:
    """The guest's shell, at the other end of its serial port."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._numbers = itertools.count(1)
        self._read = b""

    def wait_ready(self, timeout: float) -> None:
        """Wait until the guest is up, and its process at work."""
        self._wait_for(rb"%s\r?\n()" % _READY.encode(), timeout)

    def run(self, command: str, timeout: float = 60.0) -> str:
        """What *command* says; raises GuestError where it fails, or the guest does not answer."""
        number = next(self._numbers)
        self._socket.sendall(f"{command}\necho @{number}:$?\n".encode())
        said, status = self._wait_for(rb"@%d:(\d+)\r?\n" % number, timeout)
        if status != "0":
            raise GuestError(f"{command} fails with {status}: {said}")
        return said

    def _wait_for(self, end: bytes, timeout: float) -> tuple[str, str]:
        """What is said before *end*, and what is in its group."""
        deadline = time.monotonic() + timeout
        while (found := re.search(end, self._read)) is None:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                data = b""
            if not data:
                said = self._read[-300:].decode(errors="replace")
                raise GuestError(f"the guest does not answer; it said {said!r}")
            self._read += data
        said = self._read[: found.start()].decode(errors="replace").replace("\r", "").strip()
        self._read = self._read[found.end() :]
        return said, found[1].decode()

    def check(self) -> int:
        """Have the guest look at what it holds; how often its process has added it up."""
        self.run("sha256sum -cs /tmp/sum")
        wrong = self.run(
            f"grep -v ' {SUM}$' /tmp/passes | head -n 3; dmesg | grep -E 'BUG|Oops'; :"
        )
        if wrong:
            raise GuestError(f"the guest found that something is wrong: {wrong}")
        return int(self.run("tail -n 1 /tmp/passes").split()[0])

    def uptime(self) -> float:
        """Seconds that the guest's clock has counted."""
        return float(self.run("cat /proc/uptime").split()[0])


def _archive() -> Iterator[bytes]:
    """A file system as the kernel unpacks it (Documentation/driver-api/early-userspace)."""
    folder, program = 0o40755, 0o100755
    files = [(name, folder, b"") for name in ("bin", "proc", "dev", "tmp")]
    files.append(("bin/busybox", program, (PLACE / "busybox").read_bytes()))
    files += [("init", program, _INIT.encode()), ("TRAILER!!!", 0, b"")]
    for number, (name, mode, content) in enumerate(files, 1):
        path = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        yield head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
