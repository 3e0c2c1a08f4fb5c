"""A channel around another one, to which everything is left that a subclass does not do itself."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Buffer, Channel


class WrappedChannel(Channel):
    """The *channel* within, under the same name."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.duplex = channel.duplex
        self.peer_pid = channel.peer_pid

    @property
    def name(self) -> str:
        """The name of the channel within, whose errors show it."""
        return self._channel.name

    @name.setter
    def name(self, name: str) -> None:
        self._channel.name = name

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        return self._channel.recv_into(buffer, timeout)

    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """See :meth:`Channel.send`."""
        self._channel.send(parts, timeout)

    def send_file(
        self, head: bytes, descriptor: int, offset: int, count: int, timeout: float | None = None
    ) -> None:
        """See :meth:`Channel.send_file`."""
        self._channel.send_file(head, descriptor, offset, count, timeout)

    def end_of_data(self) -> None:
        """See :meth:`Channel.end_of_data`."""
        self._channel.end_of_data()

    def turn(self, timeout: float | None, *, sending: bool) -> tuple[bool, bool]:
        """See :meth:`Channel.turn`."""
        return self._channel.turn(timeout, sending=sending)

    def keep_little(self, nbytes: int) -> None:
        """See :meth:`Channel.keep_little`."""
        self._channel.keep_little(nbytes)

    def unsent(self) -> int:
        """See :meth:`Channel.unsent`."""
        return self._channel.unsent()

    def shutdown(self) -> None:
        """See :meth:`Channel.shutdown`."""
        self._channel.shutdown()

    def close(self) -> None:
        """See :meth:`Channel.close`."""
        self._channel.close()
