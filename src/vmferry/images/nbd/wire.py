"""The socket of an NBD connection: whole messages in and out, with a deadline for each step."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

from vmferry.errors import StorageError
from vmferry.images.storage import Views
from vmferry.images.views import cut

_IOV_MAX: Final = 1024


class Wire:
    """Owns *connection*.  What goes wrong ends it, and is a StorageError that names *name*."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._socket = connection
        self._name = name
        self._broken: str | None = None

    def receive(self, count: int) -> bytearray:
        """The next *count* bytes, which the caller has bounded."""
        data = bytearray(count)
        self.receive_into(memoryview(data))
        return data

    def receive_into(self, view: memoryview) -> None:
        """Fill *view*."""
        while view.nbytes:
            try:
                count = self._usable().recv_into(view)
            except OSError as error:
                self._lose(error)
            if not count:
                self.fail("the server closed the connection")
            view = view[count:]

    def send(self, data: Views) -> None:
        """Send all of *data*."""
        while data:
            try:
                count = self._usable().sendmsg(data[:_IOV_MAX])
            except OSError as error:
                self._lose(error)
            data = cut(data, count)[1]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, a request and its answer: if it is interrupted between, all is over."""
        try:
            yield
        except Exception:
            raise  # the answer was taken to its end, or the connection has ended
        except BaseException:
            self._broken = self._broken or "a request was interrupted"
            self.close()
            raise

    def wait_closed(self) -> None:
        """Read until the server has closed its side, without believing a word."""
        self._socket.settimeout(5)
        try:
            while self._socket.recv(65536):
                pass
        except OSError:
            return

    def fail(self, why: str) -> NoReturn:
        """The connection is of no use any more."""
        if self._broken is None:
            self._broken = why
        self.close()
        raise StorageError(f"{self._name}: {self._broken}")

    def refuse(self, expected: str, found: str) -> NoReturn:
        """The server broke the rules of NBD."""
        self.fail(f"the NBD server breaks the protocol: expected {expected}, found {found}")

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _usable(self) -> socket.socket:
        if self._broken is not None:
            raise StorageError(f"{self._name}: the connection is lost: {self._broken}")
        return self._socket

    def _lose(self, error: OSError) -> NoReturn:
        if isinstance(error, TimeoutError):
            self.fail("the NBD server stays silent")
        self.fail(f"the connection to the NBD server broke: {error.strerror or error}")
