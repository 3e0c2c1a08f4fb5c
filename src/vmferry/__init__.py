"""vmferry: the live-migration engine for QEMU and for machines written in Python.

The names below are the public interface; each is loaded when it is first used, so that importing
the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    ChannelClosed,
    CheckpointDamaged,
    CheckpointIncomplete,
    LimitExceeded,
    PeerError,
    StorageError,
    StreamError,
    TransportError,
    TruncatedStream,
    UsageError,
    VmferryError,
)

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.stream_file import open_stream
    from .checkpoint.survey import Survey
    from .checkpoint.transfer import receive, send
    from .migration.connections import Deadlines
    from .migration.progress import Progress
    from .migration.source import SendOptions
    from .wire.multifd import Method
    from .wire.reader import Tolerate

__version__ = "0.1.0"

_LAZY = {
    "Checkpoint": "checkpoint.checkpoint",
    "Deadlines": "migration.connections",
    "Method": "wire.multifd",
    "Progress": "migration.progress",
    "SendOptions": "migration.source",
    "Survey": "checkpoint.survey",
    "Tolerate": "wire.reader",
    "open_stream": "checkpoint.stream_file",
    "receive": "checkpoint.transfer",
    "send": "checkpoint.transfer",
}

__all__ = [
    "ChannelClosed",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointIncomplete",
    "Deadlines",
    "LimitExceeded",
    "Method",
    "PeerError",
    "Progress",
    "SendOptions",
    "StorageError",
    "StreamError",
    "Survey",
    "Tolerate",
    "TransportError",
    "TruncatedStream",
    "UsageError",
    "VmferryError",
    "__version__",
    "open_stream",
    "receive",
    "send",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
