"""Images on an NBD server."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final

from vmferry.errors import StorageError, UsageError
from vmferry.images.aligned import AlignedAccess
from vmferry.images.storage import Access

from .connection import NbdConnection
from .handshake import negotiate
from .messages import Export
from .uri import parse
from .wire import Wire

_TIMEOUT: Final = 60.0
"""Seconds without a sign of life, also while a server flushes."""


class NbdStorage:
    """The export that *uri* names.  Who else may use it is the server's business."""

    uncached: Final = True
    """By this side; a server that caches is asked like any other."""

    def __init__(self, uri: str, *, read_only: bool) -> None:
        self.name: Final = uri
        self.read_only: Final = read_only
        self._address: Final = parse(uri)
        self._latest: socket.socket | None = None

    def open(self) -> Access:
        """See :meth:`Storage.open`."""
        return open_export(
            self._connect(), self.name, self._address.export, read_only=self.read_only
        )

    def look(self) -> Access:
        """See :meth:`Storage.look`."""
        return open_export(self._connect(), self.name, self._address.export, read_only=True)

    def abort(self) -> None:
        """Cut the latest access off: what waits for the server fails, and so does all behind it."""
        if self._latest is not None:
            with suppress(OSError):  # closed
                self._latest.shutdown(socket.SHUT_RDWR)

    def check_place(self) -> None:
        """Nothing: what an export is made of is the server's business."""

    def _connect(self) -> socket.socket:
        self._latest = connection = self._connected()
        return connection

    def _connected(self) -> socket.socket:
        where = self._address.socket
        if isinstance(where, tuple):
            try:
                connection = socket.create_connection(where, _TIMEOUT)
            except UnicodeError as error:  # of the encoding of host names
                raise UsageError(f"{self.name}: expected the name of a host") from error
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_TIMEOUT)
            connection.connect(where)
        except BaseException:
            connection.close()
            raise
        return connection


def open_export(connection: socket.socket, name: str, export: str, *, read_only: bool) -> Access:
    """An access to *export* on *connection*, which it owns from here on."""
    wire = Wire(connection, name)
    try:
        terms = negotiate(wire, export)
        if not read_only:
            _check_writable(name, terms.flags)
        access = NbdConnection(wire, name, terms)
        if terms.block == 1:
            return access
        return AlignedAccess(access, name, terms.block, memory=False)
    except BaseException:
        wire.close()
        raise


def _check_writable(name: str, flags: Export) -> None:
    if Export.READ_ONLY in flags:
        raise StorageError(f"{name}: expected an export that can be written, found a read-only one")
    if Export.FLUSH not in flags:
        raise StorageError(
            f"{name}: the NBD server has no flush: what is written could be lost at a power cut"
        )
