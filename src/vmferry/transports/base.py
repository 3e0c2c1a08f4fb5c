"""The promises that every channel and every listener keeps, whatever carries the bytes.

A channel is a pipe to the peer: it knows nothing of sections, pages or guests.  Calls block and
are made from threads; at most one thread sends on a channel and at most one receives from it at
a time, and any thread may shut it down.
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self, TypeAlias

from vmferry.errors import ChannelClosed, PeerSilent, TransportError, UsageError, printable
from vmferry.units import format_duration

Buffer: TypeAlias = bytes | bytearray | memoryview

_PIECE: Final = 256 << 10
"""Bytes of a file that are read at once."""


class _Closing(ABC):
    """What is shut down from any thread and closed at the end of a ``with`` block."""

    @abstractmethod
    def shutdown(self) -> None:
        """Make every blocked and every later call end promptly with :class:`ChannelClosed`.

        May be called from any thread, at any time, more than once, and never blocks.
        """

    @abstractmethod
    def close(self) -> None:
        """Give everything back.  Raising means without grace, never still open.  Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a failure nobody shall mistake what was sent for something whole.
        if kind is not None:
            self.shutdown()
        self.close()


class Channel(_Closing):
    """A stream of bytes to the peer, and from it where ``duplex``.

    ``name`` stands in every error; it starts as the URI and may be set to something better.
    ``duplex`` says that both directions exist, so that a return path is possible.  A channel
    that is not raises :class:`UsageError` when it is used the wrong way round.  ``peer_pid`` is the
    process at the other end of a direct connection on this host, ``None`` where that is not known.
    """

    name: str
    duplex: bool
    peer_pid: int | None = None

    @abstractmethod
    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """Receive at least one byte into *buffer*; 0 at the end of the stream and only there.

        Waits at most *timeout* seconds for the first byte, then raises :class:`TransportError`;
        ``None`` waits for ever.
        """

    def fill(self, buffer: memoryview, timeout: float | None = None) -> int:
        """Receive until *buffer* is full, or the stream ends; how many bytes came.

        Waits at most *timeout* seconds where nothing comes, and at most twice as long.
        """
        have = 0
        while have < buffer.nbytes and (count := self.recv_into(buffer[have:], timeout)):
            have += count
        return have

    @abstractmethod
    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """Send all *parts* in order, unjoined.  On any exception an unknown amount was sent.

        Where the peer takes nothing for *timeout* seconds, raises :class:`TransportError`, at the
        latest after twice as long; ``None`` waits for ever.
        """

    def send_file(
        self, head: bytes, descriptor: int, offset: int, count: int, timeout: float | None = None
    ) -> None:
        """Send *head*, and *count* bytes of a file from *offset* on, as :meth:`send` does.

        What is written to the file meanwhile, and until the peer has received them, it may get or
        not: where the transport can, it refers to the memory of the file and makes no copy.
        """
        while count:
            data = os.pread(descriptor, min(count, _PIECE), offset)
            if not data:
                raise cut_off(self.name, count)
            self.send([head, data], timeout)
            head = b""
            offset += len(data)
            count -= len(data)

    @abstractmethod
    def end_of_data(self) -> None:
        """Say that nothing more will be sent; still listen where ``duplex``.  Idempotent."""

    def turn(self, timeout: float | None, *, sending: bool) -> tuple[bool, bool]:  # noqa: ARG002
        """Wait until there is something to receive, or where *sending* room to send.

        Whether there is either; neither after *timeout* seconds.  Raises :class:`UsageError` where
        the transport cannot tell.
        """
        raise UsageError(f"{printable(self.name)}: cannot wait for both directions at once")

    def keep_little(self, nbytes: int) -> None:
        """Have :meth:`turn` tell of room only where at most about *nbytes* wait to go out."""

    def unsent(self) -> int:
        """About how many bytes wait on this side to go out; 0 where nobody knows."""
        return 0

    def duplicate(self) -> int:
        """A descriptor of the connection for another process, to be closed by the caller.

        Raises :class:`UsageError` where there is none.
        """
        raise UsageError(
            f"{printable(self.name)}: expected a connection that another process can go on with:"
            " tcp:, unix:, or fd: with a socket"
        )

    @abstractmethod
    def shutdown(self) -> None:
        """Abort, from any thread: blocked and later calls raise :class:`ChannelClosed` promptly.

        The peer's calls end promptly too, with an error or the end of the stream.  Never blocks.
        """


class Listener(_Closing):
    """Where peers connect to.  ``address`` is the URI for a peer on this machine to do so.

    ``single`` is whether there is one channel only, so that nobody else can be waited for.
    """

    address: str
    single: bool = False

    @abstractmethod
    def accept(self, timeout: float | None = None) -> Channel | None:
        """The next channel; ``None`` when there will never be another one.

        Sockets go on for ever; ``fd:``, ``exec:``, ``file:`` and ``-`` have one channel.  Waits
        at most *timeout* seconds, then raises :class:`TransportError`.
        """

    @abstractmethod
    def pending(self) -> bool:
        """Whether :meth:`accept` would return at once, as a peer has already connected."""


class SharedResource(_Closing):
    """Descriptors that several threads use: a shutdown interrupts them, the last one releases.

    A descriptor closed under a blocked call would leave the call blocked and, worse, its number
    could be reused for something else.  So calls are counted (``with self.in_use():``), and the
    descriptors are released when the last call has left after a shutdown.
    """

    name: str

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._is_shut = False
        self._is_released = False
        self._use = _Use(self._enter, self._leave)

    @abstractmethod
    def _interrupt(self) -> None:
        """Wake the calls that are blocked, and keep later ones from blocking.  Must not block."""

    @abstractmethod
    def _release(self) -> None:
        """Close the descriptors; called once, while no call uses them."""

    def shutdown(self) -> None:
        """Interrupt every call; release at once if there is none."""
        with self._lock:
            self._is_shut = True
            if not self._is_released:
                self._interrupt()
        self._release_if_idle()

    def close(self) -> None:
        """The same: what was sent before is delivered by the kernel, calls in progress end."""
        self.shutdown()

    def in_use(self) -> _Use:
        """Brackets a call that uses the descriptors."""
        return self._use

    def _enter(self) -> None:
        with self._lock:
            if self._is_shut:
                raise closed(self.name)
            self._users += 1

    def _leave(self) -> None:
        with self._lock:
            self._users -= 1
            is_shut = self._is_shut
        if is_shut:
            self._release_if_idle()

    def _release_if_idle(self) -> None:
        with self._lock:
            if self._users or not self._is_shut or self._is_released:
                return
            self._is_released = True
        self._release()


class _Use:
    """One call's hold on a :class:`SharedResource`."""

    __slots__ = ("_enter", "_leave")

    def __init__(self, enter: Callable[[], None], leave: Callable[[], None]) -> None:
        self._enter = enter
        self._leave = leave

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *_: object) -> None:
        self._leave()


def closed(name: str) -> ChannelClosed:
    """The error of a call on something that was shut down or closed on this side."""
    return ChannelClosed(f"{printable(name)}: shut down on this side")


def silent(name: str, waiting_for: str, timeout: float) -> PeerSilent:
    """The error of a wait that took too long."""
    return PeerSilent(
        f"{printable(name)}: waited {format_duration(timeout)} for {waiting_for}, nothing came"
    )


def clogged(name: str, timeout: float) -> TransportError:
    """The error of a send whose peer does not read."""
    return TransportError(
        f"{printable(name)}: waited {format_duration(timeout)} for the other side to read on, "
        "it did not"
    )


def cut_off(name: str, left: int) -> UsageError:
    """The error of sending from a file that is shorter."""
    return UsageError(f"{printable(name)}: the file to send from ends {left} bytes too early")


def check_room(name: str, buffer: memoryview) -> None:
    """Refuse to receive into nothing: the answer would look like the end of the stream."""
    if not buffer.nbytes:
        raise UsageError(f"{printable(name)}: expected a buffer of at least one byte, found none")


def sending_after_end(name: str) -> UsageError:
    """The error of a send after ``end_of_data``."""
    return UsageError(f"{printable(name)}: the end of the data was already sent, so no more can be")
