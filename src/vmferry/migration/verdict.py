"""What a source hears from the destination: that it is ready, the verdict, nothing else.

QEMU 7.2 ``migration/migration.c`` (``source_return_path_thread``); :mod:`.handover` for what is not
QEMU's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    InDoubt,
    PeerError,
    PeerSilent,
    Refused,
    TransportError,
    VmferryError,
    printable,
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
    """Hears on *main*, the main channel, what the destination says of the machine.

    A thread of its own listens, from :meth:`listen` on: a destination that refuses, or is gone,
    while there is still something to send need not be noticed by whoever sends, as a proxy between
    the two may take that for ever.  Then *broke_off* is called, by that thread, to end the sending,
    and every wait raises why.  What is heard is kept in a few numbers, however much there is of it.

    *given_up* is asked now and then; once it is true a wait raises :class:`ChannelClosed`.
    """

    def __init__(
        self,
        main: Channel,
        given_up: Callable[[], bool] = lambda: False,
        broke_off: Callable[[], None] = lambda: None,
    ) -> None:
        self._main = main
        self._given_up = given_up
        self._broke_off = broke_off
        self._reader = ReturnPathReader()
        self._thread: threading.Thread | None = None
        # Guards what is below, and tells of its changes.
        self._changed = threading.Condition()
        self._is_sending = True
        self._token: int | None = None
        self._is_handed_over = False
        self._reason = ""
        self._heeds = False
        self._ready: list[int] = []
        self._status: int | None = None
        self._has_ended = False
        self._error: VmferryError | None = None

    def listen(self) -> None:
        """Begin to hear what the destination says."""
        self._thread = threading.Thread(target=self._listen, name="return path", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread; the channel was closed, or has nothing more to say."""
        if self._thread is not None:
            self._thread.join()

    def all_sent(self) -> None:
        """Nothing more is needed to load the machine: from here on the destination may say so."""
        with self._changed:
            self._check()
            self._is_sending = False

    def await_ready(self, patience: float | None) -> Identity | None:
        """Return once the destination has loaded everything: who it is, where it waits for a *go*.

        ``None`` where it has taken the machine without asking, as a QEMU does.  Raises as
        :meth:`await_success`, and nothing is in doubt.
        """
        if not self._wait(lambda: self._status is not None or self._is_ready, patience):
            raise PeerError(self._left)
        self._check_refused()
        return Identity.from_numbers(self._ready[1:]) if self._is_ready else None

    def expect(self, token: int) -> None:
        """The ping *token* is about to be sent; what follows its answer is for somebody else."""
        with self._changed:
            self._token, self._is_sending = token, True
        if self._is_handed_over:  # by the answer to the ping before
            self._is_handed_over = False
            self.listen()

    def heeds_go(self, patience: float | None) -> bool:
        """Wait for the answer to the ping of :meth:`expect`; whether it has said :data:`HEEDS`.

        Then everything that was sent before has come, and it has nothing more to say.
        """
        if not self._wait(lambda: self._token is None, patience):
            raise PeerError(self._left)
        self.join()
        self._is_sending, self._is_handed_over = False, True
        return self._heeds

    def await_success(self, patience: float | None) -> None:
        """Return once the destination has said that it has the machine.

        Raises :class:`Refused` where it refuses, :class:`PeerError` where it asks for what belongs
        to postcopy, :class:`InDoubt` where it leaves without a word; :class:`PeerSilent` after
        *patience* seconds in all.
        """
        if not self._wait(lambda: self._status is not None, patience):
            raise InDoubt(self._left)
        self._check_refused()

    def check(self) -> None:
        """Raise why the destination has ended the migration by now, if it has."""
        with self._changed:
            self._check()

    def refusal(self) -> VmferryError | None:
        """What a destination that broke the connection had said before, if it said why.

        Where it was noticed here first: what was noticed.
        """
        if self._is_handed_over:  # it has failed, and reads no more
            self.listen()
        try:
            self.await_success(_LAST_WORDS)
        except Refused as refusal:
            return refusal
        except VmferryError:
            pass
        return self._error if self._is_sending else None

    def is_success(self) -> bool:
        """Whether a destination that is gone had said before that it has the machine."""
        try:
            self.await_success(_LAST_WORDS)
        except VmferryError:
            return False
        return True

    @property
    def _left(self) -> str:
        return f"{printable(self._main.name)}: {_LEFT}"

    @property
    def _is_ready(self) -> bool:
        return len(self._ready) > NUMBERS

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _check_refused(self) -> None:
        if self._status:
            why = f": {self._reason}" if self._reason else "; its own messages say why"
            raise Refused(f"the destination refused the machine{why}")

    def _wait(self, condition: Callable[[], bool], patience: float | None) -> bool:
        """Wait for *condition*; false where the destination has left before."""
        deadline = None if patience is None else time.monotonic() + patience
        with self._changed:
            while not condition():
                self._check()
                if self._has_ended:
                    return False
                if self._given_up():
                    raise ChannelClosed("the migration was cancelled on this side")
                left = _LOOK if deadline is None else min(_LOOK, deadline - time.monotonic())
                if left <= 0:
                    waited = format_duration(patience or 0.0)
                    raise PeerSilent(f"waited {waited} for the destination's answer")
                self._changed.wait(left)
            return True

    # In the thread

    def _listen(self) -> None:
        buffer = self._reader.buffer
        try:
            while True:
                for message in self._reader.events():
                    if self._take(message):
                        return
                if buffer.ended:
                    break
                buffer.received(self._main.recv_into(buffer.room()))
            error = None
        except VmferryError as failure:
            error = failure
        with self._changed:
            if self._is_sending and error is None:
                error = TransportError(self._left)
            self._error, self._has_ended = error, True
            self._changed.notify_all()
            is_early = self._is_sending
        if is_early:
            self._broke_off()

    def _take(self, message: Message) -> bool:
        """Note *message*; whether it is the last one to hear."""
        with self._changed:
            is_last = self._note(message)
            if self._is_sending:
                self._check_refused()
                if self._ready or self._status is not None:
                    raise PeerError(_TOO_EARLY)
            self._changed.notify_all()
            return is_last

    def _note(self, message: Message) -> bool:
        match message:
            case Reason(text):
                self._reason = text
            case Shut(status):
                self._status = status
                return True
            case Pong(value) if self._ready or value == READY:
                if not self._is_ready:
                    self._ready.append(value)
            case Pong(value):
                # It may come long before anybody asks for it.
                self._heeds |= value == HEEDS
                if value == self._token:
                    self._token = None
                    return True
            case SwitchoverAck():
                pass
            case _:
                raise PeerError(
                    f"the destination answered {type(message).__name__}, as if this were postcopy"
                )
        return False
