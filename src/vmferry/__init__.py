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
    DeclarationError,
    LimitExceeded,
    MachineError,
    PeerError,
    StateError,
    StorageError,
    StreamError,
    TransportError,
    TruncatedStream,
    UsageError,
    VmferryError,
)
from .version import __version__

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint
    from .checkpoint.export.convert import Exported, convert
    from .checkpoint.restore import Restore, Restored
    from .checkpoint.stream_file import open_stream
    from .checkpoint.survey import Survey
    from .checkpoint.transfer import receive, send
    from .migration.connections import Deadlines
    from .migration.handlers import Iterative, PieceReader, PieceWriter
    from .migration.postcopy.source import LazyOptions, Paused
    from .migration.progress import Progress
    from .migration.registry import Registry
    from .migration.saving import Machine
    from .migration.snapshot import load, save
    from .migration.source import SendOptions
    from .wire.multifd import Method
    from .wire.reader import Tolerate

_LAZY = {
    "Checkpoint": "checkpoint.checkpoint",
    "Deadlines": "migration.connections",
    "Exported": "checkpoint.export.convert",
    "Iterative": "migration.handlers",
    "LazyOptions": "migration.postcopy.source",
    "Machine": "migration.saving",
    "Method": "wire.multifd",
    "Paused": "migration.postcopy.source",
    "PieceReader": "migration.handlers",
    "PieceWriter": "migration.handlers",
    "Progress": "migration.progress",
    "Registry": "migration.registry",
    "Restore": "checkpoint.restore",
    "Restored": "checkpoint.restore",
    "SendOptions": "migration.source",
    "Survey": "checkpoint.survey",
    "Tolerate": "wire.reader",
    "convert": "checkpoint.export.convert",
    "load": "migration.snapshot",
    "open_stream": "checkpoint.stream_file",
    "receive": "checkpoint.transfer",
    "save": "migration.snapshot",
    "send": "checkpoint.transfer",
}

__all__ = [
    "ChannelClosed",
    "Checkpoint",
    "CheckpointDamaged",
    "CheckpointIncomplete",
    "Deadlines",
    "DeclarationError",
    "Exported",
    "Iterative",
    "LazyOptions",
    "LimitExceeded",
    "Machine",
    "MachineError",
    "Method",
    "Paused",
    "PeerError",
    "PieceReader",
    "PieceWriter",
    "Progress",
    "Registry",
    "Restore",
    "Restored",
    "SendOptions",
    "StateError",
    "StorageError",
    "StreamError",
    "Survey",
    "Tolerate",
    "TransportError",
    "TruncatedStream",
    "UsageError",
    "VmferryError",
    "__version__",
    "convert",
    "load",
    "open_stream",
    "receive",
    "save",
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
