"""vmferry: the live-migration engine for QEMU and for machines written in Python."""

from __future__ import annotations

__version__ = "0.1.0"
