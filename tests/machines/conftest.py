"""Machines for the tests of this room."""

from tests.machines.hosted import hosted

__all__ = ["hosted"]
