"""One-way channels over descriptors that are no sockets: pipes, files, devices.

A descriptor that can block is made non-blocking, and every wait watches a second descriptor
that :meth:`~DescriptorChannel.shutdown` sets.  The mode belongs to the pipe's end and not to
this process, so an inherited one gets its old mode back at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    StorageError,
    TransportError,
    UsageError,
    VmferryError,
    printable,
)

from . import sockets
from .base import (
    Buffer,
    Channel,
    SharedResource,
    check_room,
    clogged,
    closed,
    sending_after_end,
    silent,
)
from .failures import failure
from .gather import Gather
from .waiting import Wakeup

WRITE_MAX: Final = 8 << 20
"""Bytes in one write.  One to a file cannot be interrupted, so it must not be long."""


_PIPE_SIZE: Final = 1 << 20
"""What any user may set.  Three times as fast as the usual 64 KiB for pages with a header each:
2.7 against 0.8 GB/s."""


class DescriptorChannel(SharedResource, Channel):
    """One direction over a descriptor, which belongs to the channel from now on."""

    duplex = False

    def __init__(self, descriptor: int, name: str, *, receives: bool) -> None:
        super().__init__()
        self.name = name
        self._descriptor = descriptor
        self._receives = receives
        self._has_ended = False
        self._wakeup = Wakeup()
        self._was_blocking = os.get_blocking(descriptor)
        os.set_blocking(descriptor, False)
        with contextlib.suppress(OSError):  # no pipe, or more than this user may have
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    def recv_into(self, buffer: memoryview, timeout: float | None = None) -> int:
        """See :meth:`Channel.recv_into`."""
        check_room(self.name, buffer)
        if not self._receives:
            raise UsageError(f"{printable(self.name)}: this channel only sends")
        with self.in_use():
            while not self._is_shut:
                try:
                    count = os.readv(self._descriptor, [buffer])
                except BlockingIOError:
                    if not self._await(select.POLLIN, timeout):
                        raise silent(self.name, "data", timeout or 0.0) from None
                    continue
                except OSError as error:
                    raise self._failure("receiving", error) from error
                if not count:
                    self._check_end()
                return count
            raise closed(self.name)

    def send(self, parts: Sequence[Buffer], timeout: float | None = None) -> None:
        """See :meth:`Channel.send`."""
        if self._receives:
            raise UsageError(f"{printable(self.name)}: this channel only receives")
        gather = Gather(parts)
        with self.in_use():
            if self._has_ended:
                raise sending_after_end(self.name)
            while window := gather.window(WRITE_MAX):
                if self._is_shut:
                    raise closed(self.name)
                try:
                    gather.sent(os.writev(self._descriptor, window))
                except BlockingIOError:
                    if not self._await(select.POLLOUT, timeout):
                        raise clogged(self.name, timeout or 0.0) from None
                except OSError as error:
                    raise self._failure("sending", error) from error

    def end_of_data(self) -> None:
        """Close the descriptor, which is how the reader of a pipe finds the end."""
        with self.in_use():
            if self._has_ended or self._receives:
                return
            self._has_ended = True
            try:
                self._finish()
            finally:
                self._close_descriptor()

    def _finish(self) -> None:
        """What else there is to do before the descriptor is closed behind the last byte."""

    def _check_end(self) -> None:
        """Raise if the end of the stream, just read, is not to be trusted."""

    def _await(self, events: int, timeout: float | None) -> bool:
        return self._wakeup.wait([self._descriptor], events, timeout)

    def _close_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        with contextlib.suppress(OSError):
            os.set_blocking(descriptor, self._was_blocking)
        try:
            os.close(descriptor)
        except OSError as error:  # where a file system reports late that it had no room
            raise failure(self.name, "closing", error) from error

    def _interrupt(self) -> None:
        self._wakeup.set()

    def _release(self) -> None:
        self._wakeup.close()
        # Without an end of the data nothing was promised of what was written.
        with contextlib.suppress(StorageError, TransportError):
            self._close_descriptor()

    def _failure(self, doing: str, error: OSError) -> ChannelClosed | TransportError | StorageError:
        return closed(self.name) if self._is_shut else failure(self.name, doing, error)


def open_descriptor(number: int, uri: str, *, receives: bool) -> Channel:
    """The channel over an inherited descriptor: both directions for a socket, one for others."""
    try:
        mode = os.fstat(number).st_mode
        access = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        os.set_inheritable(number, False)
    except OSError as error:
        raise failure(uri, "opening", error) from error
    if stat.S_ISSOCK(mode):
        return sockets.adopt(number, uri)
    if access == (os.O_WRONLY if receives else os.O_RDONLY):
        wanted, found = ("reading", "writing") if receives else ("writing", "reading")
        raise UsageError(
            f"{printable(uri)}: expected a descriptor open for {wanted}, "
            f"found one that is only for {found}"
        )
    return _one_way(number, uri, receives=receives)


def _one_way(descriptor: int, uri: str, *, receives: bool) -> DescriptorChannel:
    if os.isatty(descriptor):
        raise UsageError(
            f"{printable(uri)}: expected a pipe or a file, found a terminal; "
            "redirect it (| or < or >)"
        )
    try:
        return DescriptorChannel(descriptor, uri, receives=receives)
    except OSError as error:
        raise failure(uri, "opening", error) from error


_taken: Final[set[int]] = set()
_taking: Final = threading.Lock()


def take_standard_stream(*, receives: bool) -> DescriptorChannel:
    """Standard input, or standard output, for the stream alone.

    What else this process or its children read from standard input finds it empty, and what
    they print goes to standard error: neither can damage the stream.  It can be done once.
    """
    number, what = (0, "standard input") if receives else (1, "standard output")
    with _taking:
        if number in _taken:
            raise UsageError(f"{what} can carry one stream only")
        try:
            descriptor = os.dup(number)
        except OSError as error:
            raise failure(what, "opening", error) from error
        try:
            channel = _one_way(descriptor, what, receives=receives)
        except VmferryError:
            os.close(descriptor)
            raise
        _put_away(number)
        _taken.add(number)
    return channel


def _put_away(number: int) -> None:
    """Let standard stream *number* lead to where it can do no harm."""
    if number == 1:
        with contextlib.suppress(OSError):  # standard error may be closed: then nobody listens
            os.dup2(2, 1)
            return
    with contextlib.suppress(OSError), Path(os.devnull).open("r+b") as nothing:
        os.dup2(nothing.fileno(), number)
