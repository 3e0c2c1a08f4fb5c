"""A ``qemu-storage-daemon`` that does not outlive this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Final

from vmferry.errors import UsageError

_END: Final = 60.0
"""Seconds for it to write what the format writes at its end."""
_WORDS: Final = 2000
"""How much of the end of its output goes into an error."""


def daemon_command(what: str) -> list[str]:
    """How it is started; raises :class:`UsageError` where *what* needs it and there is none."""
    program, guard = shutil.which("qemu-storage-daemon"), shutil.which("setpriv")
    if program is None or guard is None:
        missing = "setpriv (util-linux)" if program else "qemu-storage-daemon"
        raise UsageError(
            f"{what} needs {missing}, which cannot be found; it comes with QEMU (Debian:"
            " qemu-system-common)"
        )
    return [guard, "--pdeathsig", "KILL", program]


class DaemonProcess:
    """A process that does not outlive this one, and the thread that keeps it.

    The kernel kills it when the thread that started it ends (``PR_SET_PDEATHSIG``), which
    therefore waits for it.
    """

    def __init__(self, command: Sequence[str], inherited: int) -> None:
        self._output = os.memfd_create("output", os.MFD_CLOEXEC)
        self._started = Future[subprocess.Popen[bytes]]()
        self._keeper = threading.Thread(
            target=self._keep, args=(command, inherited), name="image daemon", daemon=True
        )
        self._keeper.start()
        try:
            self._process = self._started.result()
        except BaseException:
            os.close(self._output)
            raise

    def _keep(self, command: Sequence[str], inherited: int) -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(inherited,),
                start_new_session=True,
            )
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            self._started.set_exception(error)
            return
        self._started.set_result(process)
        process.wait()

    def last_words(self) -> str:
        """Why it ended, if it did."""
        self._keeper.join(1)
        if self._keeper.is_alive():
            return ""
        words = self._said()
        return words or f"qemu-storage-daemon ended with status {self._process.returncode}"

    def end(self) -> str:
        """Have it end by itself; its complaint, if there was one.  Idempotent."""
        if self._output < 0:
            return ""
        with suppress(ProcessLookupError):
            self._process.terminate()
        self._keeper.join(_END)
        late = self._keeper.is_alive()
        words = "qemu-storage-daemon did not end in time" if late else self._said()
        status = self._process.returncode
        self.kill()
        return words or (f"qemu-storage-daemon ended with status {status}" if status else "")

    def kill(self) -> None:
        """Have it ended.  Idempotent."""
        if self._output < 0:
            return
        with suppress(ProcessLookupError):
            self._process.kill()
        self._keeper.join()
        os.close(self._output)
        self._output = -1

    def _said(self) -> str:
        """The end of its output, without the options in it, on one line."""
        size = os.fstat(self._output).st_size
        text = os.pread(self._output, _WORDS, max(size - _WORDS, 0)).decode(errors="replace")
        lines = (line.rpartition("}: ")[2].strip() for line in text.splitlines())
        return "; ".join(line for line in lines if line)
