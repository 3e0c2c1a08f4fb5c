"""The seam below an image: what it is kept in, and a way in that is open while it is active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .image import Extent

Views = Sequence[memoryview]
"""Buffers as bytes, none of them empty."""


class Access(Protocol):
    """An open way into an image.  Offsets and lengths are within its size, lengths above 0.

    Errors are :class:`OSError`, to which the image adds its name, or
    :class:`~vmferry.errors.StorageError` where there is more to say.
    """

    @property
    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, into: Views) -> None:
        """See :meth:`Image.read`."""

    def write(self, offset: int, data: Views, *, durable: bool = False) -> None:
        """See :meth:`Image.write`."""

    def flush(self) -> None:
        """See :meth:`Image.flush`; that a failure is final is the image's business."""

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`Image.discard`."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See :meth:`Image.write_zeroes`."""

    def resize(self, size: int) -> None:
        """See :meth:`Image.resize`."""

    def extents(self, offset: int, length: int, *, own: bool = False) -> Sequence[Extent]:
        """What is data and what is not, without a gap from *offset* on; the end may be missing.

        With *own* data is what stands in the image itself, zeroes too, and not behind it.
        """

    def close(self) -> None:
        """Write what the format writes at its end, and let everything go, even if that fails.

        Idempotent.
        """


class Storage(Protocol):
    """Where an image is kept: the way to it, which nothing has open."""

    @property
    def name(self) -> str:
        """Its path or URI."""

    @property
    def read_only(self) -> bool:
        """Whether an access refuses to write."""

    @property
    def uncached(self) -> bool:
        """Whether what an access reads is what stands there now, whoever wrote it."""

    def open(self) -> Access:
        """The owner's access: locks are taken, all is read anew."""

    def look(self) -> Access:
        """An access that takes no locks, to read what may belong to another."""

    def check_place(self) -> None:
        """Raise where what :meth:`open` has opened is not what is to be found there now."""
