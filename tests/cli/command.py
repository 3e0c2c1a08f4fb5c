"""The command as a process, and peers for it to talk to."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROMPT = 20.0
"""Seconds within which whatever is prompt happens, with the start of a process in it."""

COMMAND = [sys.executable, "-m", "vmferry"]

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # As in a background job; whoever inherits that could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(**more: str) -> dict[str, str]:
    """What the command gets: nothing that changes its output, but *more*."""
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME", "TMPDIR")}
    return kept | more


def vmferry(
    *arguments: str | Path, stdin: bytes = b"", **more: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
        env=environment(**more),
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


class Running:
    """The command while it runs; its lines arrive in ``out`` and ``err``."""

    def __init__(
        self, *arguments: str | Path, stdin: int = subprocess.DEVNULL, **more: str
    ) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**more),
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in (
                (self._process.stdout, self.out),
                (self._process.stderr, self.err),
            )
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join(PROMPT)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, text: str) -> str:
        """The next line of either output that has *text* in it."""
        deadline = time.monotonic() + PROMPT
        while True:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            if line is not None and text in line:
                return line

    def wait_for_phase(self, phase: str) -> None:
        """With --json: wait until it is in *phase*."""
        while json.loads(self.wait_for('"progress"'))["phase"] != phase:
            pass

    def address(self) -> str:
        """Where it listens."""
        line = self.wait_for("listening")
        event = json.loads(line)["address"] if line.startswith("{") else None
        return event or line.removeprefix("listening at ")

    def wait_until_at_rest(self) -> None:
        """Wait until all its threads sleep, and go on doing so."""
        deadline = time.monotonic() + PROMPT
        rests = 0
        tasks = Path(f"/proc/{self._process.pid}/task")
        while rests < 20:
            assert time.monotonic() < deadline, "it does not come to rest"
            time.sleep(0.01)
            try:
                stats = [(task / "stat").read_text() for task in tasks.iterdir()]
            except (FileNotFoundError, ProcessLookupError):  # a thread has ended meanwhile
                rests = 0
                continue
            sleeps = all(stat.rpartition(")")[2].split()[0] == "S" for stat in stats)
            rests = rests + 1 if sleeps else 0

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def finish(self) -> int:
        """Wait for the end; the exit status."""
        status = self._process.wait(PROMPT)
        for thread in self._threads:
            thread.join(PROMPT)
        return status

    @property
    def events(self) -> list[dict[str, Any]]:
        """What came on standard output, as JSON."""
        return [json.loads(line) for line in self.out]


@contextlib.contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    """A connection to a listening command."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        place: Any = rest
    else:
        host, _, port = rest.rpartition(":")
        connection = socket.socket()
        place = (host, int(port))
    with connection:
        connection.settimeout(PROMPT)
        connection.connect(place)
        yield connection


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A destination's socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PROMPT)
        listener.bind(str(path))
        listener.listen()
        yield listener


def wait_until_read(connection: socket.socket) -> None:
    """Wait until the peer has taken everything that was sent to it."""
    deadline = time.monotonic() + PROMPT
    while struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline, "the peer does not read"
        time.sleep(0.002)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the end of the stream, or until the connection breaks."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    return data
