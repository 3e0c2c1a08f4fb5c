"""What a source hears from the destination: that it is ready, the verdict, nothing else.

QEMU 7.2 ``migration/migration.c`` (``source_return_path_thread``); :mod:`.handover` for what is not
QEMU's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    InDoubt,
    PeerError,
    PeerSilent,
    Refused,
    VmferryError,
)
from vmferry.ownership.identity import NUMBERS, Identity
from vmferry.transports import Channel
from vmferry.units import format_duration
from vmferry.wire.return_path import (
    Message,
    Pong,
    Reason,
    ReturnPathReader,
    Shut,
    SwitchoverAck,
)

from .takeover import HEEDS, READY

_LAST_WORDS: Final = 0.5
"""Seconds to look for the verdict of a destination that has broken the connection."""

_LEFT: Final = (
    "the destination closed the connection without saying that it has loaded the machine; its own"
    " messages say why"
)

_TOO_EARLY: Final = "the destination says that it has a machine that was not sent yet"

_LOOK: Final = 0.02
"""Seconds between two looks at whether the wait was given up."""


class Verdict:
    """Waits on *main*, the main channel, for what the destination says of the machine.

    *given_up* is asked now and then; once it is true a wait raises :class:`ChannelClosed`.
    """

    def __init__(self, main: Channel, given_up: Callable[[], bool] = lambda: False) -> None:
        self._main = main
        self._given_up = given_up
        self._reader = ReturnPathReader()
        self._waiting: list[Message] = []
        self._reason = ""
        self._heeds = False

    def await_ready(self, patience: float | None) -> Identity | None:
        """Return once the destination has loaded everything: who it is, where it waits for a *go*.

        ``None`` where it has taken the machine without asking, as a QEMU does.  Raises as
        :meth:`await_success`, and nothing is in doubt.
        """
        pongs: list[int] = []
        for message in self._messages(patience):
            if _is_success(message, self._reason):
                return None
            if isinstance(message, Pong) and (pongs or message.value == READY):
                pongs.append(message.value)
            if len(pongs) > NUMBERS:
                return Identity.from_numbers(pongs[1:])
        raise PeerError(_LEFT)

    def heeds_go(self, token: int, patience: float | None) -> bool:
        """Wait for the answer to the ping *token*; whether the destination has said :data:`HEEDS`.

        Then everything that was sent before has come, and it has nothing more to say.
        """
        for message in self._messages(patience):
            if _is_success(message, self._reason):
                raise PeerError(_TOO_EARLY)
            if message == Pong(token):
                return self._heeds
        raise PeerError(_LEFT)

    def await_success(self, patience: float | None) -> None:
        """Return once the destination has said that it has the machine.

        Raises :class:`Refused` where it refuses, :class:`PeerError` where it asks for what belongs
        to postcopy, :class:`InDoubt` where it leaves without a word; :class:`PeerSilent` after
        *patience* seconds in all.
        """
        if not any(_is_success(message, self._reason) for message in self._messages(patience)):
            raise InDoubt(_LEFT)

    def check_waiting(self) -> None:
        """Raise :class:`PeerError` where the destination has ended the migration by now."""
        with suppress(PeerSilent):
            if any(_is_success(message, self._reason) for message in self._messages(_LOOK)):
                raise PeerError(_TOO_EARLY)
            raise PeerError(_LEFT)

    def refusal(self) -> PeerError | None:
        """What a destination that broke the connection had said before, if it said why."""
        try:
            self.await_success(_LAST_WORDS)
        except Refused as refusal:
            return refusal
        except VmferryError:
            pass
        return None

    def is_success(self) -> bool:
        """Whether a destination that is gone had said before that it has the machine."""
        try:
            self.await_success(_LAST_WORDS)
        except VmferryError:
            return False
        return True

    def _messages(self, patience: float | None) -> Iterator[Message]:
        """What it says, up to the end of the connection; one wait may go on after another."""
        deadline = None if patience is None else time.monotonic() + patience
        buffer = self._reader.buffer
        while True:
            while self._waiting:
                message = self._waiting.pop(0)
                if isinstance(message, Reason):
                    self._reason = message.text
                else:
                    # It may come long before anybody asks for it.
                    self._heeds |= message == Pong(HEEDS)
                    yield message
            if buffer.ended:
                return
            buffer.received(self._receive(buffer.room(), deadline, patience or 0.0))
            self._waiting.extend(self._reader.events())

    def _receive(self, room: memoryview, deadline: float | None, patience: float) -> int:
        # Whatever else comes meanwhile does not move the deadline.
        while deadline is None or time.monotonic() < deadline:
            if self._given_up():
                raise ChannelClosed("the migration was cancelled on this side")
            left = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
            try:
                return self._main.recv_into(room, max(left, 0.001))
            except PeerSilent:
                continue
        raise PeerSilent(f"waited {format_duration(patience)} for the destination's answer")


def _is_success(message: Message, reason: str) -> bool:
    match message:
        case Shut(0):
            return True
        case Shut():
            why = f": {reason}" if reason else "; its own messages say why"
            raise Refused(f"the destination refused the machine{why}")
        case Pong() | SwitchoverAck():
            return False
        case _:
            raise PeerError(
                f"the destination answered {type(message).__name__}, as if this were postcopy"
            )
