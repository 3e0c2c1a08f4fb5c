"""Requests to an NBD server: one after the other, on one connection."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from vmferry.errors import StorageError
from vmferry.images.image import Extent
from vmferry.images.storage import Views
from vmferry.images.views import cut, total

from .handshake import Terms
from .messages import (
    ALLOCATION,
    DEPTH,
    DEPTH_OWN,
    REQUEST,
    REQUEST_MAGIC,
    STATUS_ZERO,
    Command,
    CommandFlag,
    Export,
)
from .replies import Answer, Blocks
from .wire import Wire

_MAX_SPAN: Final = 1 << 30
"""Bytes of a request without data: its length has 32 bits, and an answer should not take long."""


class NbdConnection:
    """An :class:`Access` to the export that *terms* were agreed for.

    Threads take turns.  What needs several requests is not one step for others.
    """

    def __init__(self, wire: Wire, name: str, terms: Terms) -> None:
        self._wire = wire
        self._name = name
        self._terms = terms
        self._lock = threading.Lock()
        self._cookies = itertools.count(1)
        self._closed = False

    @property
    def size(self) -> int:
        """See :attr:`Access.size`."""
        return self._terms.size

    def read(self, offset: int, into: Views) -> None:
        """See :meth:`Access.read`."""
        while into:
            part, into = cut(into, self._terms.most)
            self._read(offset, part)
            offset += total(part)

    def _read(self, offset: int, into: Views) -> None:
        if Export.DF in self._terms.flags:
            # QEMU answers a read that fails with an error only where it is not to be fragmented,
            # and else hangs up (7.2, ``nbd_co_send_sparse_read`` in ``nbd/server.c``).
            try:
                self._request(Command.READ, offset, total(into), flags=CommandFlag.DF, into=into)
            except OSError as error:
                if error.errno != errno.EOVERFLOW:  # too much for one chunk
                    raise
            else:
                return
        self._request(Command.READ, offset, total(into), into=into)

    def write(self, offset: int, data: Views, *, durable: bool = False) -> None:
        """See :meth:`Access.write`."""
        flag, flush = self._durable(wanted=durable)
        while data:
            part, data = cut(data, self._terms.most)
            self._request(Command.WRITE, offset, total(part), flags=flag, data=part)
            offset += total(part)
        if flush:
            self.flush()

    def flush(self) -> None:
        """See :meth:`Access.flush`."""
        self._request(Command.FLUSH)

    def discard(self, offset: int, length: int) -> None:
        """See :meth:`Access.discard`."""
        if Export.TRIM in self._terms.flags:
            self._span(Command.TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """See :meth:`Access.write_zeroes`."""
        if Export.WRITE_ZEROES in self._terms.flags:
            flags = CommandFlag.NONE if unmap else CommandFlag.NO_HOLE
            self._span(Command.WRITE_ZEROES, offset, length, flags)
            return
        zeroes = memoryview(bytes(min(length, 1 << 20)))
        for at in range(offset, offset + length, zeroes.nbytes):
            self.write(at, [zeroes[: offset + length - at]])

    def resize(self, size: int) -> None:
        """NBD has no request for it."""
        raise StorageError(f"{self._name}: cannot be resized to {size} bytes: NBD does not do that")

    def extents(self, offset: int, length: int, *, own: bool = False) -> Sequence[Extent]:
        """See :meth:`Access.extents`."""
        contexts = self._terms.contexts
        wanted = DEPTH if own else ALLOCATION
        if wanted not in contexts:
            return [Extent(offset, length)]
        length = min(length, _MAX_SPAN)
        numbers = tuple(contexts.values())
        found = self._request(Command.BLOCK_STATUS, offset, length, contexts=numbers)
        blocks = found.get(contexts[wanted])
        if blocks is None:
            self._wire.refuse("the status of blocks", "none")
        return [
            Extent(at, size, data=flags == DEPTH_OWN if own else not flags & STATUS_ZERO)
            for at, size, flags in blocks
        ]

    def close(self) -> None:
        """Say good-bye, and wait for the server to hang up.  See :meth:`Access.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                request = REQUEST.pack(REQUEST_MAGIC, 0, Command.DISC, next(self._cookies), 0, 0)
                self._wire.send([memoryview(request)])
                self._wire.wait_closed()
            except StorageError:
                return  # it broke before, and whoever asked for anything was told
            finally:
                self._wire.close()

    def _durable(self, *, wanted: bool) -> tuple[CommandFlag, bool]:
        """The flag that makes a write durable, and whether a flush has to do it instead."""
        if not wanted:
            return CommandFlag.NONE, False
        if Export.FUA in self._terms.flags:
            return CommandFlag.FUA, False
        return CommandFlag.NONE, True

    def _span(
        self, command: Command, offset: int, length: int, flags: CommandFlag = CommandFlag.NONE
    ) -> None:
        end = offset + length
        for at in range(offset, end, _MAX_SPAN):
            self._request(command, at, min(_MAX_SPAN, end - at), flags=flags)

    def _request(
        self,
        command: Command,
        offset: int = 0,
        length: int = 0,
        *,
        flags: CommandFlag = CommandFlag.NONE,
        data: Views = (),
        into: Views = (),
        contexts: tuple[int, ...] = (),
    ) -> Mapping[int, Sequence[Blocks]]:
        with self._lock, self._wire.whole():
            cookie = next(self._cookies)
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
            self._wire.send([memoryview(header), *data])
            answer = Answer(
                self._wire, cookie, self._terms.structured, offset, length, into, contexts
            )
            return answer.take()
