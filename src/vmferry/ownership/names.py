"""The name of an engine in a record: who it is, for people and for whoever asks if it lives."""

from __future__ import annotations

import os
import re
import secrets
from typing import Final

from .identity import Identity

_NAME: Final = re.compile(r"[^:]*:([0-9a-f]{16}):(\d{1,9}):(\d{1,10}):[0-9a-f]{8}")


def new_name() -> str:
    """A name for an engine of this process; never given twice."""
    return name_of(Identity.own(), secrets.token_hex(4))


def name_of(process: Identity, tag: str) -> str:
    """The name of an engine in a process of this host; *tag* has 8 hexadecimal digits."""
    node = re.sub(r"[^A-Za-z0-9.-]", "", os.uname().nodename)[:64]
    return f"{node}:{process.host:016x}:{process.pid}:{process.started}:{tag}"


def new_token() -> int:
    """What a migration calls its nominee: 64 bits that nobody guesses."""
    return secrets.randbits(64)


def is_dead(name: str) -> bool:
    """Whether the process behind *name* ran on this host and has certainly ended."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    host, pid, started = match.groups()
    return Identity(int(host, 16), int(pid), int(started)).is_dead()
