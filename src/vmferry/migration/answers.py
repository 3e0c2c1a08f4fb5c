"""What a destination says to the source: answers, and one verdict that nothing follows.

QEMU 7.2 ``migration/savevm.c`` (``loadvm_process_command``) and ``migration/migration.c``
(``migrate_send_rp_shut``).  A source that hears of success gives its machine up; one that hears of
failure, or nothing, keeps it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vmferry.errors import PeerError, TransportError, VmferryError
from vmferry.transports import Channel
from vmferry.wire.return_path import Message, Reason, Shut

_FAREWELL: Final = 0.5
"""Seconds that a source which was refused has to read so, and to close the connection itself."""


class Answers:
    """The return path of one incoming migration, used by any thread.

    *idle* is how many seconds an answer may wait for the source to read; ``None`` is for ever.
    """

    def __init__(self, idle: float | None) -> None:
        self._idle = idle
        self._main: Channel | None = None
        self._is_open = False
        self._through: Callable[[Message], None] | None = None
        self._sending = threading.Lock()
        self._has_verdict = False
        self._refusing = threading.Lock()
        self._farewell: threading.Timer | None = None

    def attach(self, main: Channel) -> None:
        """The main channel is there, and is closed with this."""
        self._main = main

    def open(self) -> None:
        """The source listens from now on."""
        if self._main is None or not self._main.duplex:
            raise PeerError(
                "the source wants a return path, which this transport cannot carry:"
                " use tcp: or unix:, or turn return-path off"
            )
        self._is_open = True

    def go_through(self, say: Callable[[Message], None] | None) -> None:
        """Have *say* send the messages from now on, as somebody else writes to the channel."""
        self._through = say

    def say(self, message: Message) -> None:
        """Send *message* if the source listens and has no verdict yet."""
        with self._sending:
            if self._main is None or not self._is_open or self._has_verdict:
                return
            self._has_verdict = isinstance(message, Shut)
            if self._through is not None:
                self._through(message)
            else:
                self._main.send([message.encode()], self._idle)

    def confirm(self) -> None:
        """Tell the source that the machine is no longer its own."""
        try:
            self.say(Shut(0))
        except TransportError as error:
            raise TransportError(
                f"{error}; the machine is saved, but its source does not know it and may run on"
            ) from None

    def refuse(self, reason: str | None = None) -> None:
        """Tell the source that it keeps its machine, and end the main channel soon.

        *reason* is for a source that understands it.

        Called by whichever thread knows first, and never waits long: what the source does not take
        within the time of the farewell it will not hear.
        """
        main = self._main
        if main is None:
            return
        if not self._is_open:
            main.shutdown()
            return
        with self._refusing:
            if self._farewell is not None or self._has_verdict:
                return
            self._farewell = threading.Timer(_FAREWELL, main.shutdown)
            self._farewell.name, self._farewell.daemon = "farewell", True
            self._farewell.start()
        with suppress(VmferryError):  # the connection may be what broke
            if reason is not None:
                self.say(Reason(reason))
            self.say(Shut(1))
            main.end_of_data()

    def await_farewell(self) -> None:
        """Read until the refused source has closed the connection, or its time is up.

        Closing a connection with bytes unread resets it, and the source may lose the answer.
        """
        if self._farewell is None or self._main is None:
            return
        unread = memoryview(bytearray(1 << 16))
        with suppress(VmferryError):
            while self._main.recv_into(unread):
                pass

    def close(self) -> None:
        """Close the main channel, and end what is still under way."""
        if self._main is not None:
            self._main.close()
        if self._farewell is not None:
            self._farewell.cancel()
            self._farewell.join()
