"""Guests of our own for tests, demo and benchmarks: they write memory and tell when it is wrong."""

from guests.check import check_ram
from guests.serial import GuestError, Serial
from guests.walker import firmware, walker

__all__ = ["GuestError", "Serial", "check_ram", "firmware", "walker"]
