"""Channels to the peer: bytes in order, and nothing about what they mean.

``connect`` and ``listen`` take QEMU's migration URIs (see ``uri``); the promises that every
channel keeps stand in ``base``.  Errors are :class:`~vmferry.errors.TransportError`,
:class:`~vmferry.errors.ChannelClosed` after a shutdown on this side, and
:class:`~vmferry.errors.StorageError` where a disk is full or broken.
"""

from __future__ import annotations

from .base import Buffer, Channel, Listener
from .endpoints import connect, listen
from .memory import memory_pair
from .ratelimit import Clock, RateLimit, limited
from .readahead import ReadAhead
from .uri import Address, parse

__all__ = [
    "Address",
    "Buffer",
    "Channel",
    "Clock",
    "Listener",
    "RateLimit",
    "ReadAhead",
    "connect",
    "limited",
    "listen",
    "memory_pair",
    "parse",
]
