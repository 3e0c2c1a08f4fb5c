"""What a source hears from the destination: the verdict, and nothing else that counts.

QEMU 7.2 ``migration/migration.c`` (``source_return_path_thread``).
"""

from __future__ import annotations

import time
from typing import Final

from vmferry.errors import ChannelClosed, PeerError, TransportError, VmferryError
from vmferry.transports import Channel
from vmferry.units import format_duration
from vmferry.wire.return_path import Message, Pong, ReturnPathReader, Shut, SwitchoverAck

_LAST_WORDS: Final = 0.5
"""Seconds to look for the verdict of a destination that has broken the connection."""


class Verdict:
    """Waits on *main*, the main channel, for what the destination says of the machine."""

    def __init__(self, main: Channel) -> None:
        self._main = main
        self._reader = ReturnPathReader()

    def await_success(self, patience: float | None) -> None:
        """Return once the destination has said that it has the machine.

        Raises :class:`PeerError` where it refuses, leaves without a word, or asks for what belongs
        to postcopy; :class:`TransportError` after *patience* seconds in all.
        """
        if not self._hear(patience):
            raise PeerError(
                "the destination closed the connection without saying that it has loaded the"
                " machine; its own messages say why"
            )

    def refusal(self) -> PeerError | None:
        """What a destination that broke the connection had said before, if it said why."""
        try:
            self._hear(_LAST_WORDS)
        except PeerError as refusal:
            return refusal
        except VmferryError:
            pass
        return None

    def _hear(self, patience: float | None) -> bool:
        """Read up to the verdict; false where the connection ends without one."""
        deadline = None if patience is None else time.monotonic() + patience
        buffer = self._reader.buffer
        while not buffer.ended:
            buffer.received(self._receive(buffer.room(), deadline, patience or 0.0))
            for message in self._reader.events():
                if _is_success(message):
                    return True
        return False

    def _receive(self, room: memoryview, deadline: float | None, patience: float) -> int:
        if deadline is None:
            return self._main.recv_into(room)
        # Whatever else comes meanwhile does not move the deadline.
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._main.recv_into(room, left)
            except ChannelClosed:
                raise
            except TransportError:
                if time.monotonic() < deadline:
                    raise
        late = format_duration(patience)
        raise TransportError(f"waited {late} for the destination's answer")


def _is_success(message: Message) -> bool:
    match message:
        case Shut(0):
            return True
        case Shut():
            raise PeerError("the destination refused the machine; its own messages say why")
        case Pong() | SwitchoverAck():
            return False
        case _:
            raise PeerError(
                f"the destination answered {type(message).__name__}, as if this were postcopy"
            )
