"""``file:``: a stream in a file, from an offset to the end.

The answer to QEMU's ``migration/file.c`` (8.2 and later).  Writing keeps what stands before the
offset and cuts off what stands behind it, as QEMU 9.1 and later and the stable 8.2 and 9.0
releases do: the remains of an older, longer stream must not follow the new one.  Nothing is left of
a stream that was not brought to its end: no part of it can look like a machine, and a disk that was
too small for it has its room back.
"""

from __future__ import annotations

import contextlib
import os
import stat

from vmferry.errors import ChannelClosed, StorageError, UsageError, printable

from .pipes import DescriptorChannel
from .uri import FileAddress


class FileChannel(DescriptorChannel):
    """One direction over a file, in which what is sent stands from the offset *start* on."""

    def __init__(self, descriptor: int, name: str, *, start: int, receives: bool) -> None:
        super().__init__(descriptor, name, receives=receives)
        self._start = start
        self._is_whole = receives
        self._file = -1 if receives else os.dup(descriptor)

    def end_of_data(self) -> None:
        """See :meth:`Channel.end_of_data`; brings the file to stable storage."""
        super().end_of_data()
        self._is_whole = True

    def close(self) -> None:
        """See :meth:`Channel.close`; cuts off what was sent if it was not brought to its end."""
        was_shut = self._is_shut
        try:
            if not was_shut:
                with contextlib.suppress(ChannelClosed):  # shut down by another thread
                    self.end_of_data()
        finally:
            super().close()
            self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, -1
        if file < 0:
            return
        if not self._is_whole:
            with contextlib.suppress(OSError):  # a device
                os.ftruncate(file, self._start)
        os.close(file)

    def _finish(self) -> None:
        """Bring the file to stable storage: whoever sent it may give up the original now."""
        if stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._failure("writing to the disk", error) from error


def open_file(address: FileAddress, uri: str, *, receives: bool) -> FileChannel:
    """Open the file that *address* names, at its offset; a sender creates it for the owner only."""
    flags = os.O_RDONLY if receives else os.O_WRONLY | os.O_CREAT
    with contextlib.ExitStack() as undo:
        try:
            # Without blocking, as the open of a named pipe waits for its other end.
            descriptor = os.open(address.path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
            undo.callback(os.close, descriptor)
            os.set_blocking(descriptor, True)
            mode = os.fstat(descriptor).st_mode
            if stat.S_ISFIFO(mode) or stat.S_ISDIR(mode):
                raise UsageError(
                    f"{printable(uri)}: expected a file, found a "
                    f"{'named pipe; use exec:cat' if stat.S_ISFIFO(mode) else 'directory'}"
                )
            if stat.S_ISREG(mode) and not receives:
                os.ftruncate(descriptor, address.offset)
            if address.offset:
                os.lseek(descriptor, address.offset, os.SEEK_SET)
            channel = FileChannel(descriptor, uri, start=address.offset, receives=receives)
        except OSError as error:
            text = f"{printable(uri)}: cannot be opened: {error.strerror}"
            raise StorageError(text) from error
        undo.pop_all()
        return channel
