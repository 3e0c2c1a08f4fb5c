"""A machine in a process of its own: ``vmferry run``, started, watched, and ended for certain."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from vmferry.errors import MachineError, PeerError, TransportError, VmferryError
from vmferry.machines import MachineConfig
from vmferry.machines.config import to_toml
from vmferry.machines.guest.console import Console
from vmferry.qemu.hosting import CHECK
from vmferry.qemu.process import ended
from vmferry.qemu.qmp import Qmp

_POLL: Final = 0.02
_END: Final = 10.0
"""Seconds that the process may take to end before it is killed."""


class MachineProcess:
    """The machine of *config* in a process of its own, inside a ``with`` block.

    The guest starts at once; with *incoming*, a URI or ``defer``, it is one that is migrated to
    there.  *timeout* (seconds) bounds the start and each command of the monitor.  *pass_fds* are
    inherited under their numbers.

    Inside the block: ``console``, what the guest says; and ``said``, all of that as it came.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        incoming: str | None = None,
        timeout: float = 30.0,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._config = config
        self._incoming = [] if incoming is None else ["--incoming", incoming]
        self._timeout = timeout
        self._pass_fds = tuple(pass_fds)
        self._cleanup = ExitStack()
        self.console = Console()
        self.said = bytearray()

    def __enter__(self) -> Self:
        with self._cleanup as cleanup:  # undone here, unless everything below succeeds
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @cached_property
    def qmp(self) -> Qmp:
        """A session with the monitor; waits at first until there is one."""
        return self._cleanup.enter_context(self._connected())

    def check(self) -> None:
        """Raise :class:`MachineError` if anything is wrong, by the guest or in its memory.

        The machine stands still: it was stopped, or has migrated away.
        """
        self.console.check()
        findings = self.qmp.execute(CHECK)["findings"]
        if findings:
            raise MachineError(f"wrong in memory: {'; '.join(map(str, findings))}")

    def quit(self) -> None:
        """End the process; everything that the guest has said is in ``said`` then.

        Raises :class:`PeerError` where it did not end well.
        """
        self.qmp.execute("quit")
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired as error:
            raise TransportError("the process of the machine does not end") from error
        self._listener.join()
        if status:
            raise self._explained(status)

    def _start(self, cleanup: ExitStack) -> None:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-")))
        (directory / "machine.toml").write_text(to_toml(self._config))
        self._monitor = directory / "qmp"
        self._errors = cleanup.enter_context((directory / "stderr").open("w+"))
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "vmferry", "run", str(directory / "machine.toml")),
                *("--qmp", str(self._monitor), "--serial", "-", "--quiet", *self._incoming),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            pass_fds=self._pass_fds,
            start_new_session=True,  # ctrl-C is for whoever started it
        )
        self._listener = threading.Thread(target=self._listen, name="serial", daemon=True)
        self._listener.start()
        cleanup.callback(self._end)

    def _connected(self) -> Qmp:
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return Qmp.connect(str(self._monitor), timeout=self._timeout)
            except TransportError:
                if (status := self._process.poll()) is not None:
                    raise self._explained(status) from None
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)

    def _explained(self, status: int) -> VmferryError:
        self._errors.seek(0)
        words = self._errors.read().strip().removeprefix("vmferry: ")
        return PeerError(f"the process of the machine ended with status {status}: {words}")

    def _listen(self) -> None:
        stdout = self._process.stdout
        while stdout and (data := stdout.read1()):  # type: ignore[attr-defined]
            self.said += data
            self.console.feed(data)

    def _end(self) -> None:
        ended(self._process, _END)
        self._listener.join()
        if self._process.stdout:
            self._process.stdout.close()
