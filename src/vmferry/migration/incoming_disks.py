"""Disks that come with a machine: what a destination does with the content of each.

QEMU 7.2 ``block_load`` in ``migration/block.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Final

from vmferry.errors import PeerError, StorageError, StreamError, printable
from vmferry.images import Image, activate_all
from vmferry.images.changes import CHUNK
from vmferry.images.filling import clear, fill
from vmferry.wire.disk import DiskChunk

from .disks import disk_name

_UNFLUSHED: Final = 64 << 20
"""Bytes after which what was written is made durable, beside what still comes."""


class IncomingDisks:
    """Fills those of *images* that can be written with what the source has on its own.

    An image of a machine that is awaited is inactive, as it may be the source's.  Whoever lets
    them be filled says that they are this side's own.  So they are activated when the first chunk
    comes, all or none.  That takes their locks: an image that the source has after all is refused,
    and not written.  They stay active until the machine takes them over, or :meth:`let_go`.

    *incremental*: the source leaves out what its images have from their backing files, which those
    here have as well.

    What fails is a :class:`StorageError` with the image's name; what cannot be on them is refused
    as the stream's error.
    """

    def __init__(self, images: Sequence[Image], *, incremental: bool = False) -> None:
        self._incremental = incremental
        self._images = {disk_name(number): image for number, image in enumerate(images)}
        self._wanted = {n: i for n, i in self._images.items() if i.size and not i.read_only}
        self._came = {
            name: bytearray(-(-image.size // CHUNK)) for name, image in self._wanted.items()
        }
        self._has_begun = False
        self._unflushed = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flushing: Future[None] | None = None

    def take(self, chunk: DiskChunk) -> None:
        """Put a chunk in its place."""
        image = self._image(chunk)
        if not self._has_begun:
            activate_all(self._wanted.values())
            self._has_begun = True
        self._came[chunk.disk][chunk.offset // CHUNK] = 1
        length = min(CHUNK, image.size - chunk.offset)
        if chunk.data is None:
            clear(image, chunk.offset, length)
        else:
            fill(image, chunk.offset, memoryview(chunk.data), length)
            self._unflushed += length
        if self._unflushed >= _UNFLUSHED:
            self.flush()

    def flush(self) -> None:
        """Begin to make durable what has come, so that little is left for the last moment."""
        if not self._has_begun:
            return  # a QEMU begins with sections that have no chunk, as it reads ahead of them
        if self._flushing is not None:
            if not self._flushing.done():
                return
            self._flushing.result()
        self._unflushed = 0
        self._flushing = self._flusher.submit(self._flush)

    def finish(self) -> None:
        """Everything has come: see that this is so, and make it durable."""
        if self._came and not self._has_begun:
            raise PeerError(
                "the source has not sent its disks: turn block on there as well, or off here"
                " where both sides share the images"
            )
        for name, came in self._came.items():
            if (missing := came.find(0)) >= 0 and not self._incremental:
                raise StreamError(
                    "all chunks of each disk",
                    f"none at {missing * CHUNK:#x}",
                    block=name,
                    advice="a source that leaves out what is in backing files needs the parameter"
                    " block-incremental here as well",
                )
        self._flusher.shutdown()
        self._flush()

    def let_go(self) -> None:
        """The machine has not come: leave the images alone, with whatever is on them by now."""
        self._flusher.shutdown()
        for image in self._wanted.values():
            with suppress(StorageError):  # what is on it is of no use to anybody
                image.inactivate()

    def _image(self, chunk: DiskChunk) -> Image:
        image = self._images.get(chunk.disk)
        if image is None:
            known = ", ".join(self._images) or "none"
            raise StreamError(
                f"a disk that this machine has ({known})", printable(chunk.disk), section="block"
            )
        if image.read_only:
            raise StorageError(f"{image.name}: cannot be filled: it was opened read-only")
        if chunk.offset >= image.size:
            raise StreamError(
                f"a sector of {image.name}, which has {image.size} bytes here",
                f"sector {chunk.sector}",
                section="block",
                block=chunk.disk,
                advice="both sides need images of the same size",
            )
        return image

    def _flush(self) -> None:
        for image in self._wanted.values():
            image.flush()
