"""A saved machine on disk: a directory of plain files, written whole or not at all."""

from __future__ import annotations

from .checkpoint import Checkpoint, StoredPages
from .manifest import Manifest
from .transfer import receive, send
from .writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Manifest", "StoredPages", "receive", "send"]
