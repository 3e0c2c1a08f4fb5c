"""Channels over stream sockets: TCP, UNIX, and those inherited as descriptors.

Linux wakes a call that is blocked on a connected socket when another thread calls
``shutdown(2)``, so channels need no descriptor of their own for that.  A peer that is blocked in
a send is freed when the socket is closed: with bytes left unread the kernel resets the
connection, and without any, bytes that still arrive are answered by a reset.  For the same reason
a close may cost the peer what it has not yet read, unless all that it sent was read before.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import select
import signal
import socket
import stat
import struct
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

from vmferry.errors import ChannelClosed, StorageError, TransportError, UsageError, printable

from .base import (
    Buffer,
    Channel,
    Listener,
    SharedResource,
    check_room,
    clogged,
    closed,
    cut_off,
    sending_after_end,
    silent,
)
from .failures import failure
from .gather import Gather
from .uri import TcpAddress, UnixAddress
from .waiting import Wakeup, ready

_INTERNET: Final = (socket.AF_INET, socket.AF_INET6)
GivenUp: TypeAlias = Callable[[], bool]
"""Whether a connection is not wanted any more; asked often while there is none yet."""
_Place: TypeAlias = tuple[Any, ...]
"""A host and a port as the socket module writes them, two items or four."""
_TIMEVAL: Final = struct.Struct("ll")
_CREDENTIALS: Final = struct.Struct("iII")
_LOOK: Final = 0.02
"""Seconds between two looks at whether a connection is still wanted."""
_LONGEST: Final = 2.0**31
"""Seconds that every kernel can count, more or less for ever."""
_UNIX_BUFFER: Final = 1 << 20
"""Twice as fast as the usual 208 KiB for pages with a header each: 7.1 against 3.4 GB/s."""
_TCP_NOTSENT_LOWAT: Final = 25
_LOOPBACK: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - not what is bound


class SocketChannel(SharedResource, Channel):
    """A connected stream socket, which belongs to the channel from now on."""

    duplex = True

    def __init__(self, sock: socket.socket, name: str) -> None:
        super().__init__()
        self.name = name
        self._socket = sock
        self._has_ended = False
        self._limits: dict[int, float | None] = {}
        self._poll = select.poll()
        self._poll.register(sock, 0)
        sock.setblocking(True)
        with contextlib.suppress(OSError):  # gone already: the first call tells
            _tune(sock)
            self.peer_pid = peer_pid(sock)

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        check_room(self.name, buffer)
        return self._receive(buffer, timeout, 0)

    def fill(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.fill`; the kernel waits for all of it."""
        have = 0
        while have < buffer.nbytes and (
            count := self._receive(buffer[have:], timeout, socket.MSG_WAITALL)
        ):
            have += count
        return have

    def _receive(self, buffer: memoryview, timeout: float | None, flags: int) -> int:
        with self.in_use():
            try:
                self._limit(socket.SO_RCVTIMEO, timeout)
                count = self._socket.recv_into(buffer, 0, flags)
            except BlockingIOError:
                raise silent(self.name, "data", timeout or 0.0) from None
            except OSError as error:
                raise self._failure("receiving", error) from error
            if self._is_shut:
                raise closed(self.name)
            return count

    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """See :meth:`Channel.send`."""
        gather = Gather(parts)
        with self.in_use():
            try:
                self._prepare_to_send(timeout)
                while window := gather.window():
                    # A program may have given SIGPIPE back its default: it must not kill us.
                    gather.sent(self._socket.sendmsg(window, (), socket.MSG_NOSIGNAL))
            except OSError as error:
                raise self._not_sent(error, timeout) from error

    def send_file(
        self, head: bytes, descriptor: int, offset: int, count: int, timeout: float | None = None
    ) -> None:
        """See :meth:`Channel.send_file`; since Linux 6.5 without a copy on this side."""
        with self.in_use(), _without_sigpipe():
            try:
                self._prepare_to_send(timeout)
                while head:
                    flags = socket.MSG_NOSIGNAL | socket.MSG_MORE
                    head = head[self._socket.send(head, flags) :]
                while count:
                    sent = os.sendfile(self._socket.fileno(), descriptor, offset, count)
                    if not sent:
                        raise cut_off(self.name, count)
                    offset += sent
                    count -= sent
            except OSError as error:
                raise self._not_sent(error, timeout) from error

    def _prepare_to_send(self, timeout: float | None) -> None:
        if self._has_ended:
            raise sending_after_end(self.name)
        self._limit(socket.SO_SNDTIMEO, timeout)

    def _not_sent(
        self, error: OSError, timeout: float | None
    ) -> ChannelClosed | TransportError | StorageError:
        if isinstance(error, BlockingIOError):
            return clogged(self.name, timeout or 0.0)
        return self._failure("sending", error)

    def end_of_data(self) -> None:
        """See :meth:`Channel.end_of_data`; the peer finds the end behind what was sent."""
        with self.in_use():
            self._has_ended = True
            # A connection that is already gone needs no end; the next call tells of it.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)

    def turn(self, timeout: float | None, *, sending: bool) -> tuple[bool, bool]:
        """See :meth:`Channel.turn`."""
        with self.in_use():
            self._poll.modify(self._socket, select.POLLIN | (select.POLLOUT if sending else 0))
            found = self._poll.poll(None if timeout is None else math.ceil(timeout * 1000))
            if self._is_shut:
                raise closed(self.name)
            events = found[0][1] if found else 0
            return bool(events & ~select.POLLOUT), bool(events & select.POLLOUT)

    def keep_little(self, nbytes: int) -> None:
        """See :meth:`Channel.keep_little`.

        A UNIX socket tells of room while a quarter of its buffer is in use, which the kernel makes
        twice as large as it is asked to (``unix(7)``, ``socket(7)``).
        """
        with self.in_use(), contextlib.suppress(OSError):  # gone already: the next call tells
            if self._socket.family == socket.AF_UNIX:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * nbytes)
            else:
                self._socket.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, nbytes)

    def unsent(self) -> int:
        """Bytes in the socket that the peer has not taken (``SIOCOUTQ``).

        Exact over TCP; a UNIX socket counts the kernel's own overhead in.
        """
        with self.in_use():
            answer = fcntl.ioctl(self._socket, termios.TIOCOUTQ, struct.pack("i", 0))
            return int(struct.unpack("i", answer)[0])

    def duplicate(self) -> int:
        """See :meth:`Channel.duplicate`."""
        with self.in_use():
            return os.dup(self._socket.fileno())

    def _limit(self, option: int, timeout: float | None) -> None:
        # Left to the kernel: a poll before each read would cost as much as a read of 50 KB.
        if timeout != self._limits.get(option):
            _limit_waits(self._socket, option, timeout)
            self._limits[option] = timeout

    def _interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _release(self) -> None:
        self._socket.close()

    def _failure(self, doing: str, error: OSError) -> ChannelClosed | TransportError | StorageError:
        return closed(self.name) if self._is_shut else failure(self.name, doing, error)


@contextlib.contextmanager
def _without_sigpipe() -> Iterator[None]:
    """Keep ``sendfile(2)``, which has no flag for it, from killing a program over a broken pipe."""
    if signal.getsignal(signal.SIGPIPE) is signal.SIG_IGN:  # as in any Python that left it so
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
    try:
        yield
    finally:
        signal.sigtimedwait({signal.SIGPIPE} - before, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tune(sock: socket.socket) -> None:
    if sock.family in _INTERNET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    elif sock.family == socket.AF_UNIX:
        # The kernel sizes TCP's buffers by itself, but not these.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNIX_BUFFER)


def peer_pid(sock: socket.socket) -> int | None:
    """Who is at the other end of a UNIX socket (``unix(7)``, ``SO_PEERCRED``)."""
    if sock.family != socket.AF_UNIX:
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(raw)[0]
    return pid or None


class SocketListener(SharedResource, Listener):
    """Listening sockets: one, or one for each address that a host name stands for."""

    def __init__(self, sockets: Sequence[socket.socket], address: str) -> None:
        super().__init__()
        self.name = self.address = address
        self._sockets = sockets
        self._wakeup = Wakeup()
        for sock in sockets:
            sock.setblocking(False)

    def accept(self, timeout: float | None = None) -> Channel:
        """See :meth:`Listener.accept`; never ``None``."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.in_use():
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                is_ready = self._wakeup.wait(self._sockets, select.POLLIN, left)
                if self._is_shut:
                    raise closed(self.name)
                if timeout is not None and not is_ready:
                    raise silent(self.name, "a connection", timeout)
                if (sock := self._take()) is not None:
                    return self._channel(sock)

    def pending(self) -> bool:
        """See :meth:`Listener.pending`."""
        with self.in_use():
            return ready(self._sockets, select.POLLIN, 0)

    def _take(self) -> socket.socket | None:
        for sock in self._sockets:
            try:
                return sock.accept()[0]
            except (BlockingIOError, ConnectionAbortedError):
                continue  # the peer gave up between the wait and the call
            except OSError as error:
                raise failure(self.name, "accepting a connection", error) from error
        return None

    def _channel(self, sock: socket.socket) -> SocketChannel:
        name = self.address
        with contextlib.suppress(OSError):  # gone already: the first call tells
            if sock.family in _INTERNET:
                name = str(TcpAddress(*sock.getpeername()[:2]))
        return SocketChannel(sock, name)

    def _interrupt(self) -> None:
        self._wakeup.set()

    def _release(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._wakeup.close()


class UnixListener(SocketListener):
    """A listening UNIX socket, whose file goes away with it."""

    def __init__(self, sock: socket.socket, uri: str, path: Path) -> None:
        super().__init__([sock], uri)
        self._path = path
        self._file = _identity(path)

    def _release(self) -> None:
        super()._release()
        with contextlib.suppress(OSError):
            # Another listener may have replaced it in the meantime: that one is not ours.
            if _identity(self._path) == self._file:
                self._path.unlink()


def connect_tcp(
    address: TcpAddress, uri: str, timeout: float | None, given_up: GivenUp
) -> SocketChannel:
    """Connect to the first address of the host that answers, within *timeout* seconds in all."""
    if not address.host or not address.port:
        raise UsageError(f"{printable(uri)}: connecting needs a host and a port")
    deadline = None if timeout is None else time.monotonic() + timeout
    last = OSError("the host has no address")
    for family, place in _resolve(address, uri):
        try:
            return _dial(family, place, uri, deadline, given_up)
        except BlockingIOError:
            raise silent(uri, "an answer", timeout or 0.0) from None
        except OSError as error:
            last = error
    raise failure(uri, "connecting", last) from last


def connect_unix(
    address: UnixAddress, uri: str, timeout: float | None, given_up: GivenUp
) -> SocketChannel:
    """Connect to a UNIX socket; *timeout* bounds the wait for room in the listener's queue."""
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        return _dial(socket.AF_UNIX, os.fsencode(address.path), uri, deadline, given_up)
    except BlockingIOError:
        raise silent(uri, "room in the listener's queue", timeout or 0.0) from None
    except OSError as error:
        raise failure(uri, "connecting", error) from error


def listen_tcp(address: TcpAddress, uri: str) -> SocketListener:
    """Listen on every address that the host stands for, as QEMU does, on one port."""
    sockets: list[socket.socket] = []
    port = address.port
    last = OSError("the host has no address")
    with contextlib.ExitStack() as undo:
        for family, place in _resolve(address, uri, passive=True):
            try:
                sock = undo.enter_context(_bound(family, (place[0], port, *place[2:])))
            except OSError as error:
                # A kind of address that this machine lacks may be missing; a port that another
                # program holds may not: peers would reach that program.
                if error.errno == errno.EADDRINUSE:
                    raise failure(uri, "listening", error) from error
                last = error
                continue
            port = sock.getsockname()[1]
            sockets.append(sock)
        if not sockets:
            raise failure(uri, "listening", last) from last
        listener = _listener(lambda: SocketListener(sockets, _reachable(sockets[0])), uri)
        undo.pop_all()
        return listener


def listen_unix(address: UnixAddress, uri: str) -> SocketListener:
    """Listen on a path.  As with QEMU, a socket that is already there is replaced unasked.

    Asking whether it is alive would be a connection, which a waiting QEMU takes for its source.
    Unlike QEMU, this never removes anything but a socket.
    """
    path = Path(address.path)
    with contextlib.ExitStack() as undo:
        try:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(path.lstat().st_mode):
                    raise UsageError(
                        f"{printable(uri)}: expected a socket or nothing at that path, found a "
                        "file of another kind; remove it or choose another path"
                    )
                path.unlink()
            sock = undo.enter_context(_bound(socket.AF_UNIX, os.fsencode(path)))
        except OSError as error:
            raise failure(uri, "listening", error) from error
        listener = _listener(lambda: UnixListener(sock, uri, path), uri)
        undo.pop_all()
        return listener


def adopt(number: int, uri: str) -> SocketChannel:
    """The channel over an inherited descriptor that is known to be a socket."""
    try:
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise failure(uri, "opening", error) from error
    is_connected = False
    with contextlib.suppress(OSError):
        is_connected = sock.type == socket.SOCK_STREAM and sock.getpeername() is not None
    if not is_connected:
        sock.detach()
        raise UsageError(
            f"{printable(uri)}: expected a connected stream socket, found another kind"
        )
    sock.set_inheritable(False)
    return SocketChannel(sock, uri)


def _resolve(
    address: TcpAddress, uri: str, *, passive: bool = False
) -> list[tuple[socket.AddressFamily, _Place]]:
    """The kinds and addresses of a host, the preferred one first."""
    flags = socket.AI_PASSIVE if passive else 0
    # As bytes, so that Python's own rules for international names stay out of it.
    host = address.host.encode("ascii") or None
    try:
        found = socket.getaddrinfo(
            host, address.port, address.family, socket.SOCK_STREAM, flags=flags
        )
    except OSError as error:
        raise failure(uri, f"looking up {printable(address.host)}", error) from error
    return [(family, place) for family, _, _, _, place in found]


def _dial(
    family: socket.AddressFamily,
    place: _Place | bytes,
    uri: str,
    deadline: float | None,
    given_up: GivenUp,
) -> SocketChannel:
    """Connect; :class:`BlockingIOError` when the deadline passes first."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _connect(sock, place, uri, deadline, given_up)
        _limit_waits(sock, socket.SO_SNDTIMEO, None)
        return SocketChannel(sock, uri)
    except BaseException:
        sock.close()
        raise


def _connect(
    sock: socket.socket,
    place: _Place | bytes,
    uri: str,
    deadline: float | None,
    given_up: GivenUp,
) -> None:
    # In short waits, each of which goes on where the one before has ended: nothing else wakes a
    # call that waits for room in the queue of a UNIX socket.
    _limit_waits(sock, socket.SO_SNDTIMEO, _LOOK)
    while not given_up():
        try:
            return sock.connect(place)
        except BlockingIOError:
            if deadline is not None and time.monotonic() > deadline:
                raise
    raise closed(uri)


def _limit_waits(sock: socket.socket, option: int, seconds: float | None) -> None:
    """Let the kernel end each wait of a kind after *seconds*, with :class:`BlockingIOError`.

    *option* is ``SO_SNDTIMEO``, for a connect and for room to send, or ``SO_RCVTIMEO``.  The
    socket stays a blocking one: a UNIX socket that does not block cannot wait for room in the
    listener's queue at all.
    """
    # Zeros mean for ever; what the kernel cannot count is as good as that.
    microseconds = 0 if seconds is None else math.ceil(min(max(seconds, 1e-6), _LONGEST) * 1e6)
    sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(*divmod(microseconds, 1_000_000)))


def _bound(family: socket.AddressFamily, place: _Place | bytes) -> socket.socket:
    """A socket that listens at *place*."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family in _INTERNET:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # IPv4 has a socket of its own where it is wanted.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(place)
        sock.listen(socket.SOMAXCONN)
    except BaseException:
        sock.close()
        raise
    return sock


def _listener(make: Callable[[], SocketListener], uri: str) -> SocketListener:
    try:
        return make()
    except OSError as error:
        raise failure(uri, "listening", error) from error


def _reachable(sock: socket.socket) -> str:
    """The URI under which this machine reaches a listening socket."""
    host, port = sock.getsockname()[:2]
    return str(TcpAddress(_LOOPBACK.get(host, host), port))


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
