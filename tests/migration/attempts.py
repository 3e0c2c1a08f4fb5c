"""A destination at work, and everything that must be true when it has ended."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from tests.transports.support import PROMPT, background
from vmferry import Checkpoint, Deadlines, TransportError, VmferryError, receive
from vmferry.migration.destination import Destination
from vmferry.transports import Buffer, Channel, connect
from vmferry.wire.return_path import Message, ReturnPathReader, Shut

SOON = 1.0
"""Seconds within which a destination has decided on a byte that it could read."""

PATIENT = Deadlines(connect=PROMPT, first=PROMPT, idle=PROMPT)


class Attempt:
    """``receive`` in a thread; connect to it, talk to it, then ask for its outcome.

    Leaving it checks that nothing is left of it: no thread, no descriptor.
    """

    def __init__(self, directory: Path | None = None, uri: str = "unix", **options: Any) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="vmferry-")
        home = Path(self._home.name)
        self.directory = home / "checkpoint" if directory is None else directory
        self._uri = f"unix:{home}/socket" if uri == "unix" else uri
        self._options = {"deadlines": PATIENT} | options
        self._peers: list[Peer] = []
        self._listening = threading.Event()
        self._destination: Destination | None = None

    def __enter__(self) -> Self:
        self._threads = set(threading.enumerate())
        self._descriptors = descriptors()
        self._ended_at = 0.0
        self._future = background(self._run)
        assert self._listening.wait(PROMPT)
        return self

    @property
    def destination(self) -> Destination:
        """What ``receive`` runs, once it listens."""
        if self._destination is None:
            self._future.result(PROMPT)  # raises why there is none
        assert self._destination is not None
        return self._destination

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._destination is not None:
            self._destination.cancel()
        for peer in self._peers:
            peer.close()
        error = self._future.exception(PROMPT)
        if error is None:
            self._future.result().close()
        self._home.cleanup()
        if kind is None:
            _settle(lambda: not self._threads_left() and not self._descriptors_left())
            assert not self._threads_left()
            assert not self._descriptors_left()

    def _run(self) -> Checkpoint:
        try:
            return receive(self._uri, self.directory, started=self._started, **self._options)
        finally:
            self._ended_at = time.monotonic()
            self._left_at_once = [
                thread.name for thread in threading.enumerate() if is_ours(thread)
            ]
            self._listening.set()

    def _started(self, destination: Destination) -> None:
        self._destination = destination
        self._listening.set()

    def connect(self, *said: Buffer) -> Peer:
        """One more connection, on which *said* is sent."""
        peer = Peer(connect(self.destination.address))
        self._peers.append(peer)
        peer.say(*said)
        return peer

    def checkpoint(self) -> Checkpoint:
        """What was received."""
        checkpoint = self._future.result(PROMPT)
        assert not self._left_at_once
        return checkpoint

    def raised(self, kind: type[BaseException]) -> Any:
        """What went wrong, when every thread had ended."""
        error = self._future.exception(PROMPT)
        assert isinstance(error, kind), error
        assert not self._left_at_once
        return error

    def error(self, kind: type[BaseException] = VmferryError) -> Any:
        """What went wrong, and nothing is left of the checkpoint."""
        error = self.raised(kind)
        assert not self.directory.exists() or not any(self.directory.iterdir())
        return error

    def _threads_left(self) -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - self._threads]

    def _descriptors_left(self) -> set[str]:
        return descriptors() - self._descriptors


class Peer:
    """The source's end of one connection."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._reader = ReturnPathReader()

    def say(self, *parts: Buffer) -> None:
        """Send *parts*."""
        self.channel.send(parts)

    def end(self) -> None:
        """Send no more."""
        self.channel.end_of_data()

    def close(self) -> None:
        """Close it."""
        self.channel.close()

    def answers(self, timeout: float = PROMPT) -> list[Message]:
        """What the destination says until it says no more; a connection reset is no more too."""
        heard: list[Message] = []
        buffer = self._reader.buffer
        while not self._reader.finished:
            try:
                count = self.channel.recv_into(buffer.room(), timeout)
            except TransportError as error:
                if "reset" not in str(error):
                    raise
                break
            buffer.received(count)
            heard += self._reader.events()
        return heard

    def await_answer(self, message: Message) -> None:
        """Read up to this answer."""
        buffer = self._reader.buffer
        while message not in list(self._reader.events()):
            buffer.received(self.channel.recv_into(buffer.room(), PROMPT))

    def verdict(self, timeout: float = PROMPT) -> int | None:
        """The status of the only SHUT, which is the last that is said; ``None`` without one.

        Then the connection is closed, as sources do.
        """
        heard = self.answers(timeout)
        self.close()
        verdicts = [message.status for message in heard if isinstance(message, Shut)]
        assert len(verdicts) <= 1
        assert not verdicts or isinstance(heard[-1], Shut)
        return verdicts[0] if verdicts else None

    def ends(self, timeout: float = SOON + 1) -> None:
        """The connection is over: the end of the data comes, or an error, but no silence."""
        deadline = time.monotonic() + timeout
        scratch = memoryview(bytearray(4096))
        left = timeout
        with suppress(VmferryError):
            while left > 0 and self.channel.recv_into(scratch, left):
                left = deadline - time.monotonic()
        assert time.monotonic() < deadline


def is_ours(thread: threading.Thread) -> bool:
    """Whether a thread belongs to a migration."""
    return thread.name in {"peer", "farewell", "read ahead"}


def descriptors() -> set[str]:
    """The open files of this process."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except OSError:
            continue
    return found


def _settle(condition: Callable[[], bool]) -> None:
    """Give the threads of the test itself a moment to end."""
    deadline = time.monotonic() + PROMPT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)


@contextmanager
def decided_soon() -> Iterator[None]:
    """What happens within is over within the time that a destination has to decide."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PROMPT - 1  # any other deadline is PROMPT or more
