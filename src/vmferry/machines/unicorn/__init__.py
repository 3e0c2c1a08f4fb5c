"""Processors of the Unicorn emulator: for hosts without KVM, and slow.

The only place that imports the ``unicorn`` package, which ``pip install vmferry[unicorn]`` brings.
"""

from .host import UnicornHost

__all__ = ["UnicornHost"]
