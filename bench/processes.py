"""Programs run as processes, with what they took, and never for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bench.measure import Sample, Unmeasured

TIMEOUT = 300.0
"""Seconds after which a process is killed."""

_WARM = """
import mmap
taken = [mmap.mmap(-1, 3 << 29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
for memory, size in zip(taken, (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE)):
    memory.madvise(size)
    memory.madvise(23)  # MADV_POPULATE_WRITE, Linux 5.14
"""


class Process:
    """A process inside a ``with`` block; gone afterwards.

    Its standard output is a pipe, ``output``, unless it is to be thrown away.
    """

    def __init__(
        self, command: Sequence[str], *, discard: bool = False, stdin: int | IO[bytes] | None = None
    ) -> None:
        self._command = command
        self._discard = discard
        self._stdin = subprocess.DEVNULL if stdin is None else stdin
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            self._started = time.perf_counter()
            self._process = subprocess.Popen(
                self._command,
                stdin=self._stdin,
                stdout=subprocess.DEVNULL if self._discard else subprocess.PIPE,
                stderr=self._errors,
            )
            self.output = self._process.stdout
            self.input = self._process.stdin
            stack.callback(self._end)
            watchdog = threading.Timer(TIMEOUT, self._process.kill)
            watchdog.start()
            stack.callback(watchdog.cancel)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self.output, self.input):
            if pipe is not None:
                pipe.close()

    def cpu(self) -> float:
        """Seconds of CPU that it has taken so far."""
        return cpu_of(self._process.pid)

    def anonymous(self) -> float:
        """Bytes of memory that no file stands behind (``proc(5)``, ``RssAnon``)."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return float(line.split()[1]) * 1024
        raise Unmeasured("the kernel does not tell a process's anonymous memory")

    def wait(self) -> Sample:
        """Wait for the end: ``seconds`` since the start, ``cpu`` seconds, ``peak`` bytes of memory.

        The peak is at least that of this process at the start, as the kernel counts it.
        """
        _, status, usage = os.wait4(self._process.pid, 0)
        seconds = time.perf_counter() - self._started
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise Unmeasured(f"exit status {self._process.returncode}: {said[-300:]}")
        cpu = usage.ru_utime + usage.ru_stime
        return {"seconds": seconds, "cpu": cpu, "peak": usage.ru_maxrss * 1024}

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event of ``--json``."""
        while True:
            event: dict[str, Any] = json.loads(self.line())
            if event["event"] == name:
                return event

    def line(self) -> bytes:
        """The next line of its output."""
        line = self.output.readline() if self.output else b""
        if not line:
            self.wait()
            raise Unmeasured("it ended without saying what it should")
        return line


def cpu_of(pid: int) -> float:
    """Seconds of CPU that a process has taken (``proc(5)``, fields 14 and 15 of ``stat``)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def vmferry(*arguments: str) -> list[str]:
    """The command line of ``vmferry``."""
    return [sys.executable, "-m", "vmferry", *arguments]


def run(command: Sequence[str]) -> Sample:
    """Run to the end, without its output; see :meth:`Process.wait`."""
    with Process(command, discard=True) as process:
        return process.wait()


def warm_memory() -> None:
    """Take as much memory as a sample may need, in large pages and small ones, and give it back.

    In a virtual machine the host may hand out memory when it is touched first, and get back what
    lies free: taking it then costs ten times as much, and whoever comes first would pay.
    """
    # Not in this process, whose own peak counts in that of those it starts.
    run([sys.executable, "-c", _WARM])
