"""RAM blocks on ``memfd_create(2)``, mapped shared."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from vmferry.errors import UsageError, VmferryError, printable
from vmferry.units import format_size

PAGE_SIZE: Final = 4096
"""Bytes of a page, in blocks and in dirty logs."""

_MAX_NAME: Final = 255
"""Bytes of a name: its length is one byte on the wire (QEMU 7.2 ``migration/ram.c``)."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemoryBlock:
    """One RAM block: *size* bytes at *address*, which are the content of the descriptor *fd*.

    Another process may map ``fd``, whose size is sealed.  A dirty log sees writes to ``view``,
    ``array`` and ``address``, by whatever thread or virtual CPU of this process; it does not see
    writes to ``fd``, nor those through another mapping of it.

    ``shared`` blocks are not sent (QEMU's ``x-ignore-shared``).  ``read_only`` ones are so for the
    guest: the host may fill them.  Neither is in a dirty log.
    """

    def __init__(self, name: str, size: int, *, shared: bool, read_only: bool) -> None:
        self.name: Final = name
        self.size: Final = size
        self.shared: Final = shared
        self.read_only: Final = read_only
        try:
            self.fd: Final = os.memfd_create(_label(name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _refused(name, size, error) from error
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, size)
        except OSError as error:
            os.close(self.fd)
            raise _refused(name, size, error) from error
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)
        self.view = memoryview(self._mapping)
        self.address: Final = self.array.ctypes.data

    @property
    def pages(self) -> int:
        """How many pages the block has."""
        return self.size // PAGE_SIZE

    @property
    def logged(self) -> bool:
        """Whether the block is in a dirty log."""
        return not (self.shared or self.read_only)

    def next_populated(self, start: int) -> int:
        """Where from byte *start* on there is memory next, in bytes; ``size`` if nowhere.

        All else was never touched, and is zero.  It stays so only while nobody looks: reading a
        page through a mapping allocates it.
        """
        try:
            return os.lseek(self.fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size
            raise

    def populated(self) -> npt.NDArray[np.uint8]:
        """A byte for each page, 0 where there is no memory: such a page was never touched."""
        found = np.zeros(self.pages, np.uint8)
        at = self.next_populated(0)
        while at < self.size:
            end = os.lseek(self.fd, at, os.SEEK_HOLE)
            found[at // PAGE_SIZE : end // PAGE_SIZE] = 1
            at = self.next_populated(end) if end < self.size else end
        return found

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds a view of it any more."""
        self.view.release()
        self.array = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.fd)

    def __repr__(self) -> str:
        return f"<MemoryBlock {printable(self.name)} of {format_size(self.size)}>"


class GuestMemory:
    """The RAM blocks of a machine, in the order of their addition, until :meth:`close`."""

    page_size: ClassVar[int] = PAGE_SIZE

    def __init__(self) -> None:
        self._blocks: dict[str, MemoryBlock] = {}
        self._lock = threading.Lock()
        self._watchers: list[Callable[[MemoryBlock], None]] = []

    def add(
        self, name: str, size: int, *, shared: bool = False, read_only: bool = False
    ) -> MemoryBlock:
        """One more block, of zeros; also while the machine runs and while a dirty log is active.

        *size* in bytes, a multiple of the page size; *name* as on the wire, 1 to 255 bytes.
        """
        if size <= 0 or size % PAGE_SIZE:
            raise UsageError(
                f"block {printable(name)}: expected a size of one or more whole pages of "
                f"{PAGE_SIZE} bytes, found {size}"
            )
        if not 1 <= len(name.encode()) <= _MAX_NAME:
            raise UsageError(
                f"expected a block name of 1 to {_MAX_NAME} bytes, found {printable(name)}"
            )
        with self._lock:
            if name in self._blocks:
                raise UsageError(f"there is a block {printable(name)} already")
            block = MemoryBlock(name, size, shared=shared, read_only=read_only)
            try:
                for watcher in self._watchers:
                    watcher(block)
            except BaseException:
                block.close()
                raise
            self._blocks[name] = block
        return block

    @property
    def blocks(self) -> tuple[MemoryBlock, ...]:
        """All blocks."""
        return tuple(self._blocks.values())

    def __getitem__(self, name: str) -> MemoryBlock:
        try:
            return self._blocks[name]
        except KeyError:
            raise UsageError(f"there is no block {printable(name)}") from None

    @property
    def total(self) -> int:
        """Bytes of all blocks together."""
        return sum(block.size for block in self.blocks)

    def watch(self, watcher: Callable[[MemoryBlock], None]) -> None:
        """Call *watcher* for every block, now and when it is added, before anybody can write."""
        with self._lock:
            for block in self._blocks.values():
                watcher(block)
            self._watchers.append(watcher)

    def unwatch(self, watcher: Callable[[MemoryBlock], None]) -> None:
        """Call *watcher* no more, if it was called at all."""
        with self._lock:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

    def close(self) -> None:
        """Close all blocks."""
        with self._lock:
            for block in self._blocks.values():
                block.close()
            self._blocks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _label(name: str) -> str:
    """What ``/proc/PID/maps`` shows: ASCII without NUL, of at most 249 bytes."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in name)[:249]


def _refused(name: str, size: int, error: OSError) -> VmferryError:
    return VmferryError(
        f"block {printable(name)}: no memory of {format_size(size)} to be had: {error.strerror}"
    )
