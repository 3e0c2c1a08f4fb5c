"""What the operating system reports, put into words: who, doing what, why, and what to do."""

from __future__ import annotations

import errno
from typing import Final

from vmferry.errors import StorageError, TransportError, printable

_ADVICE: Final = {
    errno.ECONNREFUSED: "nothing listens there: start the destination first "
    "(for QEMU: -incoming with this address)",
    errno.EADDRINUSE: "something else listens there: stop it or choose another address",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EACCES: "check the permissions of the path, or the user this runs as",
    errno.EPERM: "check the permissions of the path, or the user this runs as",
    errno.ENOENT: "check the path; a socket exists only while its listener runs",
    errno.EBADF: "the descriptor must be open in this process, in the right direction",
    errno.ECONNRESET: "the other side broke off; its own messages may say why",
    errno.EPIPE: "the other side no longer reads; its own messages may say why",
    errno.EHOSTUNREACH: "check the address and the route to it",
    errno.ENETUNREACH: "check the address and the route to it",
    errno.ETIMEDOUT: "the other machine no longer answers",
    errno.EMFILE: "this process has too many open files: raise its limit (ulimit -n)",
    errno.ENOSPC: "free some space or choose another file system",
    errno.EDQUOT: "free some space or have the quota raised",
}

_STORAGE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""Faults of the disk behind a file or a redirected descriptor; no socket or pipe has them."""


def failure(name: str, doing: str, error: OSError) -> TransportError | StorageError:
    """What to raise for *error*, which *name* met while *doing*."""
    text = f"{printable(name)}: {doing} failed: {error.strerror or error}"
    if advice := _ADVICE.get(error.errno or 0):
        text += f"; {advice}"
    return StorageError(text) if error.errno in _STORAGE else TransportError(text)
