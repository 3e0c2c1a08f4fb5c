"""Ports of this host for those that have to be told one."""

from __future__ import annotations

import random
import socket

_PORTS = range(20_000, 32_000)
"""Below what the kernel gives to whoever wants any: so nobody else gets it by chance."""


def free_port() -> int:
    """A port on which nobody listens."""
    while True:
        port = random.choice(_PORTS)  # noqa: S311
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
