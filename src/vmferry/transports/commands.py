"""``exec:``: one pipe from or to a shell command, and the command's fate.

The answer to QEMU's ``migration/exec.c``: the command runs under ``/bin/sh -c``.  Its other
standard stream is nobody's: input is empty, output goes to our standard error.  It runs in a
session of its own, so a ctrl-C in the terminal reaches it only through this channel, and it
cannot wait for a password there.

A command that fails is an error of the channel: a receiver learns of it in place of the end of
the stream, a sender from ``end_of_data`` or ``close``.  A command that is not wanted any more,
because its channel was shut down or closed before its end, is ended, and its status ignored.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    CommandFailed,
    StorageError,
    TransportError,
    printable,
)
from vmferry.units import format_duration

from .base import closed
from .failures import failure
from .pipes import DescriptorChannel

END_WAIT: Final = 60.0
"""Seconds that a command may go on after the end of its input, or of its output."""

_GRACE: Final = 1.0
"""Seconds from a polite signal to one that cannot be refused."""

_EXPLAINED: Final = {126: " (it cannot be executed)", 127: " (the command was not found)"}


class CommandChannel(DescriptorChannel):
    """The pipe to a running command; created by :func:`start_command`."""

    def __init__(
        self, process: subprocess.Popen[bytes], descriptor: int, name: str, *, receives: bool
    ) -> None:
        self._process = process
        self._is_status_due = True
        super().__init__(descriptor, name, receives=receives)

    def end_of_data(self) -> None:
        """Close the command's input, and wait until it has ended well, 60 seconds at most."""
        super().end_of_data()
        with self.in_use():
            if not self._receives and self._is_status_due:
                self._check_status()

    def shutdown(self) -> None:
        """End the command too, before it takes the end of its input for the end of the data."""
        self._signal(signal.SIGTERM)
        super().shutdown()

    def close(self) -> None:
        """Wait for the command as ``end_of_data`` does, then make sure that nothing is left."""
        was_shut = self._is_shut
        try:
            if not was_shut:
                with contextlib.suppress(ChannelClosed):  # shut down while it waits here
                    self.end_of_data()
        finally:
            super().close()
            self._reap(politely=not was_shut)

    def _check_end(self) -> None:
        self._check_status()

    def _check_status(self) -> None:
        """Wait for the end of the command, and raise if it is not a good one."""
        self._is_status_due = False  # told once, whatever it is
        status = self._await_end(END_WAIT)
        if status is None:
            late = format_duration(END_WAIT)
            raise self._error(f"the command still runs {late} after the end of the data")
        if status:
            raise self._failed(status)

    def _await_end(self, seconds: float) -> int | None:
        """The status of the command once it has ended; a shutdown ends the wait."""
        try:
            with _watch(self._process) as watched:
                has_ended = self._wakeup.wait([watched], select.POLLIN, seconds)
        except ProcessLookupError:  # ended, and its status was taken already
            has_ended = True
        except OSError as error:
            raise failure(self.name, "waiting for the command", error) from error
        if self._is_shut:
            raise closed(self.name)
        return self._process.wait() if has_ended else None

    def _failure(self, doing: str, error: OSError) -> ChannelClosed | TransportError | StorageError:
        # A command that no longer reads is about to say why.
        if error.errno == errno.EPIPE and not self._is_shut:
            status = self._await_end(_GRACE)
            if status is not None:
                self._is_status_due = False
                return self._failed(status, " before it had read everything")
        return super()._failure(doing, error)

    def _failed(self, status: int, when: str = "") -> TransportError:
        text = f"{printable(self.name)}: {_describe(status)}{when}"
        # One that was killed had no time to say what became of what it had read.
        return CommandFailed(text) if status > 0 else TransportError(text)

    def _error(self, text: str) -> TransportError:
        return TransportError(f"{printable(self.name)}: {text}")

    def _signal(self, number: signal.Signals) -> None:
        # To the group: the shell may have started others, which hold the pipe.
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _reap(self, *, politely: bool) -> None:
        steps = (None, signal.SIGTERM, signal.SIGKILL)
        for number in steps if politely else steps[1:]:
            if number is not None:
                self._signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE)
                return
        raise self._error(f"process {self._process.pid} of the command cannot be killed")


@contextlib.contextmanager
def _watch(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that becomes readable when *process* ends."""
    if process.poll() is not None:
        raise ProcessLookupError
    watched = os.pidfd_open(process.pid)
    try:
        yield watched
    finally:
        os.close(watched)


def _describe(status: int) -> str:
    if status < 0:
        return f"the command was killed by signal {-status}"
    return f"the command ended with status {status}{_EXPLAINED.get(status, '')}"


def start_command(command: str, uri: str, *, receives: bool) -> CommandChannel:
    """Run *command* in the shell; a receiver gets its output, a sender feeds its input."""
    try:
        readable, writable = os.pipe()
        ours, theirs = (readable, writable) if receives else (writable, readable)
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, ours)
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", command],
                    stdin=subprocess.DEVNULL if receives else theirs,
                    stdout=theirs if receives else 2,
                    start_new_session=True,
                )
            finally:
                os.close(theirs)
            undo.callback(process.wait)
            undo.callback(process.kill)
            channel = CommandChannel(process, ours, uri, receives=receives)
            undo.pop_all()
            return channel
    except OSError as error:
        raise failure(uri, "starting the command", error) from error
