"""Requests of any shape on storage that takes whole blocks only: O_DIRECT, or an NBD server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

import numpy as np

from vmferry.errors import StorageError

from .gate import Gate
from .image import Extent
from .storage import Access, Views
from .views import copy, cut, total

_FLAGS: Final = MAP_PRIVATE | MAP_ANONYMOUS
_BOUNCE: Final = 1 << 20
"""Bytes of a request that is copied; a multiple of every block size."""


class AlignedAccess:
    """Whole blocks go to *inner* as they come; anything else through a buffer of whole blocks.

    *block* is a power of two.  With *memory* the addresses of buffers have to be multiples of it
    too.  A write of part of a block reads the block first, so it is alone meanwhile: what others
    write beside it stays.
    """

    def __init__(self, inner: Access, name: str, block: int, *, memory: bool) -> None:
        if inner.size % block:
            raise StorageError(
                f"{name}: expected a size in blocks of {block} bytes, found {inner.size} bytes"
            )
        self._inner = inner
        self._name = name
        self._block = block
        self._memory = memory
        self._order = Gate()

    @property
    def size(self) -> int:
        """See :attr:`Access.size`."""
        return self._inner.size

    def read(self, offset: int, into: Views) -> None:
        """See :meth:`Access.read`."""
        if self._fits(offset, into):
            self._inner.read(offset, into)
            return
        for start, end, buffer in self._windows(offset, total(into)):
            first, into = cut(into, end - start)
            low = self._down(start)
            self._inner.read(low, [buffer])
            copy([buffer[start - low : end - low]], first)

    def write(self, offset: int, data: Views, *, durable: bool = False) -> None:
        """See :meth:`Access.write`."""
        if self._fits(offset, data):
            with self._order.shared():
                self._inner.write(offset, data, durable=durable)
            return
        for start, end, buffer in self._windows(offset, total(data)):
            first, data = cut(data, end - start)
            with self._order.alone():
                self._patch(start, end, buffer, first, durable=durable)

    def flush(self) -> None:
        """See :meth:`Access.flush`."""
        self._inner.flush()

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`Access.discard`; parts of blocks are left as they are."""
        start, end = self._up(offset), self._down(offset + length)
        if start < end:
            with self._order.shared():
                self._inner.discard(start, end - start)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See :meth:`Access.write_zeroes`."""
        end = offset + length
        start, stop = self._up(offset), self._down(end)
        if start >= stop:
            self.write(offset, [memoryview(bytes(length))])
            return
        if offset < start:
            self.write(offset, [memoryview(bytes(start - offset))])
        with self._order.shared():
            self._inner.write_zeroes(start, stop - start, unmap=unmap)
        if stop < end:
            self.write(stop, [memoryview(bytes(end - stop))])

    def resize(self, size: int) -> None:
        """See :meth:`Access.resize`."""
        if size % self._block:
            raise StorageError(
                f"{self._name}: expected a size in blocks of {self._block} bytes, found {size}"
            )
        self._inner.resize(size)

    def extents(self, offset: int, length: int, *, own: bool = False) -> Sequence[Extent]:
        """See :meth:`Access.extents`."""
        start, end = self._down(offset), self._up(offset + length)
        found = self._inner.extents(start, end - start, own=own)
        clipped = (
            Extent(low, min(extent.end, offset + length) - low, data=extent.data)
            for extent in found
            for low in [max(extent.offset, offset)]
        )
        return [extent for extent in clipped if extent.length > 0]

    def close(self) -> None:
        """See :meth:`Access.close`."""
        self._inner.close()

    def _fits(self, offset: int, views: Views) -> bool:
        return not offset % self._block and all(
            not view.nbytes % self._block and not (self._memory and _address(view) % self._block)
            for view in views
        )

    def _windows(self, offset: int, length: int) -> Iterator[tuple[int, int, memoryview]]:
        """Pieces of the request: from where to where, and a buffer for the whole blocks of it."""
        memory = memoryview(mmap(-1, min(_BOUNCE, length + 2 * self._block), _FLAGS))
        end = offset + length
        while offset < end:
            low = self._down(offset)
            stop = min(end, low + self._down(memory.nbytes))
            yield offset, stop, memory[: self._up(stop) - low]
            offset = stop

    def _patch(
        self, start: int, end: int, buffer: memoryview, data: Views, *, durable: bool
    ) -> None:
        """Write *data* at *start* to *end*, with the rest of its blocks as it is."""
        low, high, block = self._down(start), self._up(end), self._block
        if low < start:
            self._inner.read(low, [buffer[:block]])
        if end < high:
            self._inner.read(high - block, [buffer[-block:]])
        copy(data, [buffer[start - low : end - low]])
        self._inner.write(low, [buffer], durable=durable)

    def _down(self, offset: int) -> int:
        return offset & -self._block

    def _up(self, offset: int) -> int:
        return -(-offset & -self._block)


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data
