"""Guest memory: RAM blocks on memfd, and logs of the pages that were written."""

from __future__ import annotations

from .blocks import GuestMemory, MemoryBlock
from .holes import PAGE_SIZE, REGION
from .kvm import KvmSlots
from .log import DirtyLog, open_dirty_log

__all__ = [
    "PAGE_SIZE",
    "REGION",
    "DirtyLog",
    "GuestMemory",
    "KvmSlots",
    "MemoryBlock",
    "open_dirty_log",
]
