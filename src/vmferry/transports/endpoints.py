"""From a URI to a channel: who sends connects, who receives listens."""

from __future__ import annotations

import threading

from .base import Channel, Listener, closed
from .commands import start_command
from .files import open_file
from .pipes import open_descriptor, take_standard_stream
from .sockets import GivenUp, connect_tcp, connect_unix, listen_tcp, listen_unix
from .uri import (
    CommandAddress,
    DescriptorAddress,
    FileAddress,
    StandardStreams,
    TcpAddress,
    UnixAddress,
    parse,
)

CONNECT_TIMEOUT = 30.0
"""Seconds to wait for an answer from the other side."""


def connect(
    uri: str,
    *,
    timeout: float | None = CONNECT_TIMEOUT,
    given_up: GivenUp = lambda: False,
) -> Channel:
    """A channel to send through, to what *uri* names.

    Raises :class:`~vmferry.errors.ChannelClosed` soon after *given_up*, which is asked while nobody
    answers, is true.  The look-up of a host's name cannot be broken off.

    ``exec:`` writes to the command, ``file:`` to the file, ``-`` to standard output.  A
    descriptor given as ``fd:`` belongs to the channel from now on.
    """
    match parse(uri):
        case TcpAddress() as address:
            return connect_tcp(address, uri, timeout, given_up)
        case UnixAddress() as address:
            return connect_unix(address, uri, timeout, given_up)
        case address:
            return _open(address, uri, receives=False)


def listen(uri: str) -> Listener:
    """Where to accept channels to receive from.

    Sockets take any number of peers.  ``exec:`` (the command's output), ``file:``, ``fd:`` and
    ``-`` (standard input) are opened now and have one channel.
    """
    match parse(uri):
        case TcpAddress() as address:
            return listen_tcp(address, uri)
        case UnixAddress() as address:
            return listen_unix(address, uri)
        case address:
            return SingleListener(_open(address, uri, receives=True), uri)


def _open(
    address: CommandAddress | DescriptorAddress | FileAddress | StandardStreams,
    uri: str,
    *,
    receives: bool,
) -> Channel:
    match address:
        case CommandAddress(command):
            return start_command(command, uri, receives=receives)
        case DescriptorAddress(number):
            return open_descriptor(number, uri, receives=receives)
        case FileAddress():
            return open_file(address, uri, receives=receives)
        case StandardStreams():
            return take_standard_stream(receives=receives)


class SingleListener(Listener):
    """What has one channel, and has it already."""

    single = True

    def __init__(self, channel: Channel, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._channel: Channel | None = channel
        self._is_shut = False

    def accept(self, timeout: float | None = None) -> Channel | None:  # noqa: ARG002
        """The channel, the first time; then ``None``."""
        with self._lock:
            if self._is_shut:
                raise closed(self.address)
            channel, self._channel = self._channel, None
            return channel

    def pending(self) -> bool:
        """Always: neither the channel nor ``None`` has to be waited for."""
        with self._lock:
            if self._is_shut:
                raise closed(self.address)
            return self._channel is not None

    def shutdown(self) -> None:
        """See :meth:`Listener.shutdown`; a channel that was accepted lives on."""
        with self._lock:
            self._is_shut = True
            channel = self._channel
        if channel is not None:
            channel.shutdown()

    def close(self) -> None:
        """Close the channel too if nobody accepted it."""
        self.shutdown()
        with self._lock:
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
