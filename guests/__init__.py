"""Guests of our own for tests, demo and benchmarks: they write memory and tell when it is wrong."""

from guests.serial import GuestError, Serial
from guests.walker import walker

__all__ = ["GuestError", "Serial", "walker"]
