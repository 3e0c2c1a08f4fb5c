"""Guest memory: RAM blocks on memfd, and logs of the pages that were written."""

from __future__ import annotations

from .blocks import PAGE_SIZE, GuestMemory, MemoryBlock
from .log import DirtyLog, open_dirty_log

__all__ = [
    "PAGE_SIZE",
    "DirtyLog",
    "GuestMemory",
    "MemoryBlock",
    "open_dirty_log",
]
