"""The pager's process, as the process of the machine sees it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

from vmferry.migration.takeover import ABORT, GO, GRANTED
from vmferry.transports import Channel
from vmferry.wire.postcopy import Continuation

from .pager import MESSAGE, describe

_MODULE: Final = "vmferry.migration.postcopy.pager"

WORDS: Final = (GO, GRANTED, ABORT)
"""Pings that are not answered but told."""

_END: Final = 10.0
"""Seconds that the process may take to say the last word and end."""


class PagerProcess:
    """Starts a pager.  *hear* is told each of its messages, by a thread of its own.

    The last one is ``{"event": "gone", "reason": ...}``, when the process has ended.
    """

    def __init__(self, hear: Callable[[dict[str, Any]], None]) -> None:
        self._hear = hear
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ExitStack() as undo:
            undo.callback(self._control.close)
            with theirs:
                # In a session of its own: ctrl-C is for the machine's process.
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, "-P", "-m", _MODULE],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            undo.pop_all()
        self._thread = threading.Thread(target=self._listen, name="pager", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def memory(
        self, blocks: Sequence[object], threads: Sequence[int], faults: int, marks: int
    ) -> None:
        """The memory, as in :class:`~.missing.MappedBlock`, and the descriptors that go with it.

        *threads* as in :class:`~.waits.Waits`; *marks* is that of :class:`~.shared.Shared`.
        """
        self._tell("memory", blocks=blocks, threads=threads, descriptors=[faults, marks])

    def stream(
        self,
        start: Continuation,
        main: Channel,
        head: bytes,
        *,
        idle: float | None,
    ) -> None:
        """A connection to the source, of which *head* was read already."""
        self._stream(start, main, head, recovery=False, idle=idle, words=WORDS, source=())

    def resume(
        self, start: Continuation, main: Channel, source: Sequence[int], *, idle: float | None
    ) -> None:
        """A connection for a recovery.

        *source* are the pings by which who comes says that it is the source from before, where
        that had said who it is.
        """
        self._stream(start, main, b"", recovery=True, idle=idle, words=(), source=source)

    def _stream(self, start: Continuation, main: Channel, head: bytes, **told: Any) -> None:
        told["start"] = describe(start)
        with _Descriptor(main.duplicate()) as link, _Descriptor(os.memfd_create("head")) as file:
            os.write(file, head)
            self._tell("stream", **told, descriptors=[link, file])

    def urgent(self, channel: Channel) -> None:
        """The preempt channel that belongs to the stream."""
        with _Descriptor(channel.duplicate()) as link:
            self._tell("urgent", descriptors=[link])

    def keep(self) -> None:
        """Give nothing up from now on; answered by ``kept``."""
        self._tell("keep")

    def say(self, data: bytes) -> None:
        """Send *data* to the source."""
        self._tell("say", data=data.hex())

    def flush(self) -> None:
        """Have it tell ``said`` when all that it was to say is on its way."""
        self._tell("flush")

    def close(self) -> None:
        """Let it end, when it has sent what was said."""
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self.kill()
        self._thread.join()
        self._control.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def _tell(self, do: str, *, descriptors: Sequence[int] = (), **more: Any) -> None:
        with suppress(OSError):  # it is gone: what is heard last says so
            socket.send_fds(self._control, [json.dumps({"do": do} | more).encode()], descriptors)

    def _listen(self) -> None:
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE, 1)
            except OSError:
                data, descriptors = b"", []
            if not data:
                break
            message = json.loads(data)
            if descriptors:
                message["descriptor"] = descriptors[0]
            self._hear(message)
        status = self._process.wait()
        self._hear({"event": "gone", "reason": f"the pager has ended with status {status}"})


class _Descriptor:
    """A descriptor, closed at the end of the block."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __enter__(self) -> int:
        return self._number

    def __exit__(self, *_: object) -> None:
        os.close(self._number)
