"""Physical memory as one flat file: the byte at an address is the byte at that offset.

Zero pages are holes, and so is what lies between segments, such as the gap below 4 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from vmferry.checkpoint.checkpoint import Checkpoint
from vmferry.errors import CheckpointDamaged, storage_error
from vmferry.migration.progress import Meter

from .copy import copy_sparse
from .layout import Layout, Segment


def write_raw(checkpoint: Checkpoint, layout: Layout, path: Path, meter: Meter) -> None:
    """Fill the empty file *path*."""
    placed = ((segment, segment.address) for segment in layout.segments)
    write_memory(checkpoint, placed, path, layout.end, meter)


def write_memory(
    checkpoint: Checkpoint,
    placed: Iterable[tuple[Segment, int]],
    path: Path,
    size: int,
    meter: Meter,
) -> None:
    """Make *path* a durable file of *size* bytes, with each segment at the offset beside it."""
    try:
        target = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(target, size)
            for segment, offset in placed:
                _write_segment(checkpoint, segment, target, offset, meter)
            os.fsync(target)
        finally:
            os.close(target)
    except OSError as error:
        raise storage_error(path, "written", error) from None


def _write_segment(
    checkpoint: Checkpoint, segment: Segment, target: int, offset: int, meter: Meter
) -> None:
    def passed(count: int) -> None:
        meter.count(transferred=count)
        meter.tick()

    pages = checkpoint.memory(segment.block)
    if pages is None:
        return  # no layout has such a segment
    try:
        source = os.open(pages.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(pages.path, "opened", error) from None
    try:
        copy_sparse(source, segment.offset, segment.size, target, offset, passed)
    except EOFError:
        raise CheckpointDamaged(f"{pages.path}: shorter than {pages.size} bytes") from None
    finally:
        os.close(source)
