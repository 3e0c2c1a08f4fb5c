"""RAM blocks on ``memfd_create(2)``, or on a file that two processes share, mapped shared."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from vmferry.errors import StorageError, UsageError, VmferryError, printable, storage_error
from vmferry.units import format_size

from .holes import PAGE_SIZE, REGION, next_populated, populated
from .mapping import Mapping

_MAX_NAME: Final = 255
"""Bytes of a name: its length is one byte on the wire (QEMU 7.2 ``migration/ram.c``)."""

_REMOVE: Final = 9
"""``MADV_REMOVE``: a hole in what is mapped."""

_POPULATE_READ: Final = 22
_POPULATE_WRITE: Final = 23
"""``MADV_POPULATE_READ`` and ``_WRITE``, Linux 5.14."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class MemoryBlock:
    """One RAM block: *size* bytes at *address*, which are the content of the descriptor *fd*.

    Another process may map ``fd``; its size is sealed.  Dirty logs see what this process writes
    through ``view``, ``array`` and ``address``.  They do not see what is written to ``fd``, nor
    what other processes write.

    ``shared``: another process that has the memory too can do without its content (QEMU's
    ``x-ignore-shared``).  ``read_only``: the guest cannot write it; the host may.  *file* is the
    path of one that has the content, of this size, or is made.

    Views of the block that somebody holds stay valid when it is closed.
    """

    def __init__(
        self, name: str, size: int, *, shared: bool, read_only: bool, file: str | None = None
    ) -> None:
        self.name: Final = name
        self.size: Final = size
        self.shared: Final = shared
        self.read_only: Final = read_only
        self._file: Final = file
        with _refusal(name, size), contextlib.ExitStack() as cleanup:
            self.fd: Final = _memory(name, size) if file is None else _opened(file, size)
            cleanup.callback(os.close, self.fd)
            mapping = Mapping(self.fd, size)
            cleanup.pop_all()
        self.array: npt.NDArray[np.uint8] = mapping.array
        self.view = mapping.view
        self.address: Final = mapping.address
        self._mappings = {self.address: mapping}
        self._image: tuple[Mapping, memoryview] | None = None
        self.has_missing = False
        """Whether pages are still on their way, and whoever touches one waits for it."""
        self.use_huge_pages(self.address, on=True)

    def check_alone(self) -> None:
        """Raise :class:`~vmferry.errors.StorageError` where another process has the file too.

        To be asked before anything is put there that is not what the other one has.
        """
        if self._file is None:
            return
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(
                f"{self._file}: another process has this memory too: end that, or let the machine"
                " move with x-ignore-shared"
            ) from error
        fcntl.flock(self.fd, fcntl.LOCK_SH)

    def preallocate(self) -> None:
        """Take all of the memory now, so that nobody waits for it later.

        In huge pages, where the host has them.  Raises :class:`~vmferry.errors.VmferryError` where
        it does not have as much.
        """
        with contextlib.suppress(OSError):
            for region in range(self.size // REGION):
                self.collapse(region)
        with _refusal(self.name, self.size):
            self._mappings[self.address].advise(_POPULATE_WRITE)

    def collapse(self, region: int) -> None:
        """Have a *region* of 2 MiB, by its number, in one huge page (:meth:`Mapping.collapse`)."""
        self._mappings[self.address].collapse(region)

    @property
    def pages(self) -> int:
        """How many pages the block has."""
        return self.size // PAGE_SIZE

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the block is mapped: at ``address``, and perhaps for virtual CPUs as well."""
        return tuple(self._mappings)

    def next_populated(self, start: int) -> int:
        """Where from byte *start* on there is memory next, in bytes; ``size`` if nowhere."""
        found = next_populated(self.fd, start)
        return self.size if found is None else found

    def populated(self) -> npt.NDArray[np.uint8]:
        """A byte for each page, 0 where there is no memory: such a page was never touched.

        It is zero, and stays without memory only as long as nobody reads it.
        """
        return populated(self.fd, self.address, 0, self.pages).view(np.uint8)

    def fetch(self, start: int, length: int) -> None:
        """Wait for what is missing of *length* bytes from *start* on, as :attr:`has_missing` says.

        For whoever is about to touch memory in Python: that keeps the interpreter lock, and so all
        of the process, until the page has come.  This does not.
        """
        if not self.has_missing or not length:
            return
        first, last = start // PAGE_SIZE, -(-(start + length) // PAGE_SIZE)
        # Where the kernel has no such call, or may not wait itself, the one who touches it does.
        with contextlib.suppress(OSError):
            size = (last - first) * PAGE_SIZE
            self._mappings[self.address].advise(_POPULATE_READ, first * PAGE_SIZE, size)

    def discard(self, start: int, length: int) -> None:
        """Give up *length* bytes from *start* on: they have no memory, and are zero."""
        with _refusal(self.name, length):
            self._mappings[self.address].advise(_REMOVE, start, length)

    def map_again(self) -> int:
        """One more mapping of the block; its address.  See :meth:`GuestMemory.map_for_vcpus`."""
        with _refusal(self.name, self.size):
            mapping = Mapping(self.fd, self.size)
        self._mappings[mapping.address] = mapping
        self.use_huge_pages(mapping.address, on=True)
        return mapping.address

    @property
    def image(self) -> memoryview:
        """The bytes, to be read alone and in large amounts, through a mapping of its own.

        In ``view`` a log by ``userfaultfd`` keeps the kernel from mapping more than one page for
        each fault, and takes huge pages to pieces.
        """
        if self._image is None:
            with _refusal(self.name, self.size):
                mapping = Mapping(self.fd, self.size)
            self._image = mapping, mapping.view.toreadonly()
        return self._image[1]

    def use_huge_pages(self, address: int, *, on: bool) -> None:
        """Let a mapping have huge pages, where the host has them for shared memory, or not.

        ``/sys/kernel/mm/transparent_hugepage/shmem_enabled`` says whether it has.
        """
        # EINVAL where the kernel has no huge pages: that is right, too.
        with contextlib.suppress(OSError):
            self._mappings[address].advise(mmap.MADV_HUGEPAGE if on else mmap.MADV_NOHUGEPAGE)

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds a view of it any more."""
        self.view.release()
        self.array = np.empty(0, np.uint8)
        if self._image is not None:
            mapping, view = self._image
            view.release()
            mapping.close()
        for mapping in self._mappings.values():
            mapping.close()
        os.close(self.fd)

    def __repr__(self) -> str:
        return f"<MemoryBlock {printable(self.name)} of {format_size(self.size)}>"


Watcher = Callable[[MemoryBlock, int], None]
"""What is told of a block and the address of a mapping of it, before anybody writes there."""


class GuestMemory:
    """The RAM blocks of a machine, in the order of their addition, until :meth:`close`."""

    page_size: ClassVar[int] = PAGE_SIZE

    def __init__(self) -> None:
        self._blocks: dict[str, MemoryBlock] = {}
        self._for_vcpus: dict[MemoryBlock, int] = {}
        self._lock = threading.Lock()
        self._watchers: list[Watcher] = []

    def add(
        self,
        name: str,
        size: int,
        *,
        shared: bool = False,
        read_only: bool = False,
        file: str | None = None,
    ) -> MemoryBlock:
        """One more block, of zeros; also while the machine runs and while a dirty log is active.

        *size* in bytes, a multiple of the page size; *name* as on the wire, 1 to 255 bytes.  *file*
        is the path of a file on a ``tmpfs``, as below ``/dev/shm``, that has its content, for
        another process to have it too.
        Raises :class:`~vmferry.errors.UsageError` for others,
        :class:`~vmferry.errors.VmferryError` where the host has no such memory, and
        :class:`~vmferry.errors.StorageError` for a file that cannot be opened.
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
            block = MemoryBlock(name, size, shared=shared, read_only=read_only, file=file)
            try:
                self._announce(block, block.address)
            except BaseException:
                block.close()
                raise
            self._blocks[name] = block
        return block

    def map_for_vcpus(self, block: MemoryBlock) -> int:
        """The address of a mapping of the block that only virtual CPUs of KVM write through.

        What they write to a page that ``userfaultfd`` protects costs twice what KVM's own log
        costs them.  Here that log is enough, and ``userfaultfd`` protects ``address`` alone, for
        what the host writes.  Logs of any kind see what is written in either place.
        """
        with self._lock:
            if block not in self._for_vcpus:
                address = block.map_again()
                self._announce(block, address)
                self._for_vcpus[block] = address
            return self._for_vcpus[block]

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

    def watch(self, watcher: Watcher) -> None:
        """Tell *watcher* of every mapping of every block, now and when it is made."""
        with self._lock:
            for block in self._blocks.values():
                for address in block.addresses:
                    watcher(block, address)
            self._watchers.append(watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell *watcher* no more."""
        with self._lock:
            self._watchers.remove(watcher)

    def _announce(self, block: MemoryBlock, address: int) -> None:
        for watcher in self._watchers:
            watcher(block, address)

    def close(self) -> None:
        """Close all blocks."""
        with self._lock:
            for block in self._blocks.values():
                block.close()
            self._blocks.clear()
            self._for_vcpus.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _memory(name: str, size: int) -> int:
    """A descriptor of so much memory, whose size is sealed."""
    fd = os.memfd_create(_label(name), os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, fd)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        cleanup.pop_all()
    return fd


def _opened(file: str, size: int) -> int:
    """A descriptor of a file of this size; one that is not there, or is empty, is made so."""
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise storage_error(file, "opened", error) from error
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size not in {0, size}:
            raise UsageError(
                f"{file}: expected a file of {size} bytes or an empty one, found {status.st_size}"
            )
        os.ftruncate(fd, size)
        with contextlib.suppress(BlockingIOError):  # somebody looks whether he is alone
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        cleanup.pop_all()
    return fd


def _label(name: str) -> str:
    """What ``/proc/PID/maps`` shows; at most 249 bytes, without NUL (``memfd_create(2)``)."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in name)[:249]


@contextlib.contextmanager
def _refusal(name: str, size: int) -> Iterator[None]:
    """The host's refusal, as an error of this package."""
    try:
        yield
    except OSError as error:
        raise VmferryError(
            f"block {printable(name)}: the host does not give {format_size(size)} of memory: "
            f"{error.strerror}"
        ) from error
