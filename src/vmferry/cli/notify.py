"""Telling the service manager that started this process how it is (``sd_notify(3)``)."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def tell_manager(state: str) -> None:
    """Send *state*, such as ``READY=1``; without effect where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        channel.send(state.encode())
