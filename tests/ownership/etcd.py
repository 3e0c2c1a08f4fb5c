"""An etcd of one member, on loopback, that can be frozen."""

from __future__ import annotations

import http.client
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_port
from tests.transports.support import wait_until


class Etcd:
    def __init__(self, directory: Path) -> None:
        program = shutil.which("etcd")
        if program is None:
            raise AssertionError(
                "etcd is missing, so that half of the tests of ownership cannot run:"
                " scripts/setup install etcd-server"
            )
        self.port, peer = free_port(), free_port()
        client = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [
                *(program, "--data-dir", str(directory), "--unsafe-no-fsync"),
                *("--listen-client-urls", client, "--advertise-client-urls", client),
                *("--listen-peer-urls", f"http://127.0.0.1:{peer}", "--log-level", "error"),
                *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
                *("--initial-cluster", f"default=http://127.0.0.1:{peer}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers, 30)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", "/health")
            return b"true" in connection.getresponse().read()
        except OSError:
            return False
        finally:
            connection.close()

    def uri(self, key: str, *, term: int = 15, port: int | None = None) -> str:
        return f"etcd://127.0.0.1:{port or self.port}/{key}?term={term}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            wait_until(self._stands_still)
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _stands_still(self) -> bool:
        """Whether every thread has stopped: one that has not may still answer."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        return all(state == "T" for state in states)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
