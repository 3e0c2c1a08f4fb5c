"""The rules of ownership, once for every kind of storage."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from types import TracebackType
from typing import Final, Self

from vmferry.errors import ImageInactive, StorageError, UsageError, storage_error

from .changes import CHUNK, ChangeLog
from .gate import Gate
from .image import Extent, Source, Target
from .storage import Access, Storage
from .views import as_views, total


class StoredImage:
    """An :class:`Image` in *storage*.  Inactive it has no access to it, so nothing can slip by.

    Opened inactive it is looked at once, so that what is missing or cannot be read is found now
    and not while a machine waits for its disk.
    """

    def __init__(self, storage: Storage, *, active: bool) -> None:
        self._storage: Final = storage
        self._gate: Final = Gate()
        self._access: Access | None = None
        self._lost: str | None = None
        self._numbers = itertools.count()
        self._last_change = next(self._numbers)
        self._flushed: int | None = None
        """The last change that is known to be durable."""
        self._closed = False
        self._size = 0
        self._logs: tuple[ChangeLog, ...] = ()
        self._logging = threading.Lock()
        if active:
            self.activate()
        else:
            with self._naming("opened"), closing(storage.look()) as access:
                self._size = access.size

    @property
    def name(self) -> str:
        """See :attr:`Image.name`."""
        return self._storage.name

    @property
    def size(self) -> int:
        """See :attr:`Image.size`."""
        return self._size

    @property
    def active(self) -> bool:
        """See :attr:`Image.active`."""
        return self._access is not None

    @property
    def read_only(self) -> bool:
        """See :attr:`Image.read_only`."""
        return self._storage.read_only

    @property
    def busy(self) -> bool:
        """See :attr:`Image.busy`."""
        return self._gate.busy

    def read(self, offset: int, *into: Target) -> None:
        """See :meth:`Image.read`."""
        views = as_views(into)
        with self._gate.shared(), self._naming("read"), self._readable() as access:
            if self._spans(offset, total(views)):
                access.read(offset, views)

    def write(self, offset: int, *data: Source, durable: bool = False) -> None:
        """See :meth:`Image.write`."""
        views = as_views(data)
        with self._changing("written", offset, total(views)) as access:
            if views:
                access.write(offset, views, durable=durable)

    def flush(self) -> None:
        """See :meth:`Image.flush`."""
        with self._gate.shared():
            self._flush(self._owned("flushed"))

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`Image.discard`."""
        with self._changing("discarded", offset, length) as access:
            if length:
                access.discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """See :meth:`Image.write_zeroes`."""
        with self._changing("zeroed", offset, length) as access:
            if length:
                access.write_zeroes(offset, length, unmap=unmap)

    def resize(self, size: int) -> None:
        """See :meth:`Image.resize`."""
        if size < 0:
            raise UsageError(f"{self.name}: expected a size of 0 bytes or more, found {size}")
        with self._gate.alone(), self._naming("resized"):
            access = self._changeable("resized")
            if self._logs:
                raise UsageError(f"{self.name}: cannot be resized: its changes are being noted")
            access.resize(size)
            self._size = access.size

    def allocated(
        self, offset: int = 0, length: int | None = None, *, own: bool = False
    ) -> Iterator[Extent]:
        """See :meth:`Image.allocated`."""
        end = self._size if length is None else offset + length
        while offset < end:
            with self._gate.shared(), self._naming("looked through"), self._readable() as access:
                self._spans(offset, end - offset)
                extents = access.extents(offset, end - offset, own=own)
            yield from (extent for extent in extents if extent.data)
            offset = extents[-1].end

    def log_changes(self, chunk: int = CHUNK, *, own: bool = False) -> ChangeLog:
        """See :meth:`Image.log_changes`."""
        with self._gate.shared(), self._logging:
            log = ChangeLog(self._size, self._forget, chunk, own=own)
            self._logs = (*self._logs, log)
            return log

    def activate(self) -> None:
        """See :meth:`Image.activate`."""
        with self._gate.alone(), self._naming("activated"):
            if self._closed:
                raise UsageError(f"{self.name}: expected an open image, found a closed one")
            if self._access is None:
                self._access = self._storage.open()
                self._size = self._access.size
                self._note_change()  # whoever had it before may have left something
                for log in self._logs:
                    if not log.own:  # another side may have had it meanwhile
                        log.note(0, self._size)

    def inactivate(self) -> None:
        """See :meth:`Image.inactivate`."""
        with self._gate.alone(), self._naming("inactivated"):
            if self._access is not None:
                self._flush(self._access)
                self._storage.check_place()
                self._let_go()

    def close(self) -> None:
        """See :meth:`Image.close`."""
        with self._gate.alone(), self._naming("closed"):
            self._closed = True
            if self._access is not None:
                try:
                    self._flush(self._access)
                finally:
                    self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<image {self.name}, {'active' if self.active else 'inactive'}>"

    def _owned(self, doing: str) -> Access:
        """The owner's access."""
        if self._access is None:
            state = "closed" if self._closed else "inactive"
            raise ImageInactive(f"{self.name}: cannot be {doing}: it is {state} on this side")
        return self._access

    def _changeable(self, doing: str) -> Access:
        access = self._owned(doing)
        if self.read_only:
            raise StorageError(f"{self.name}: cannot be {doing}: it was opened read-only")
        return access

    @contextmanager
    def _changing(self, doing: str, offset: int, length: int) -> Iterator[Access]:
        with self._gate.shared(), self._naming(doing):
            access = self._changeable(doing)
            self._spans(offset, length)
            try:
                yield access
            finally:
                # Also where it failed: some of it may have been done.
                self._note_change()
                for log in self._logs:
                    log.note(offset, length)

    def _forget(self, log: ChangeLog) -> None:
        with self._logging:
            self._logs = tuple(other for other in self._logs if other is not log)

    def _readable(self) -> AbstractContextManager[Access]:
        if self._access is None and self._storage.uncached and not self._closed:
            return closing(self._storage.look())
        return nullcontext(self._owned("read"))

    def _spans(self, offset: int, length: int) -> bool:
        """Whether there is anything to be done; an error if it is not within the image."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise StorageError(
                f"{self.name}: expected bytes within its size of {self._size}, found {length} "
                f"bytes from byte {offset} on"
            )
        return length > 0

    def _flush(self, access: Access) -> None:
        """Flush, unless that has failed before: the kernel tells of lost data only once."""
        if self._lost is not None:
            raise StorageError(
                f"{self.name}: cannot be flushed: writes before were lost ({self._lost})"
            )
        change = self._last_change  # what is written from here on need not be in it
        if self.read_only or self._flushed == change:
            return
        try:
            with self._naming("flushed"):
                access.flush()
        except StorageError as error:
            self._lost = str(error)
            raise
        self._flushed = change

    def _note_change(self) -> None:
        self._last_change = next(self._numbers)

    def _let_go(self) -> None:
        access, self._access = self._access, None
        if access is not None:
            access.close()

    @contextmanager
    def _naming(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self.name, doing, error) from error
