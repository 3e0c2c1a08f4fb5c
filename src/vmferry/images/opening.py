"""From a path or a URI to an image."""

from __future__ import annotations

from pathlib import Path

from vmferry.errors import UsageError

from .daemon import DaemonStorage
from .image import Image
from .nbd import NbdStorage
from .nbd.uri import SCHEMES
from .raw import RawStorage
from .stored import StoredImage


def open_image(
    where: str | Path,
    *,
    active: bool,
    format: str = "raw",  # noqa: A002 - the word of the field
    read_only: bool = False,
    share_write: bool = False,
    direct: bool = False,
) -> Image:
    """The image at *where*: a path, or an NBD URI such as ``nbd://host/export``.

    *active*: it belongs to this side from now on.  An incoming machine opens its images inactive.

    *format* is ``raw``, or for a path any that QEMU has a driver for, such as ``qcow2``; it is
    never guessed, as the guest of a raw image can make it look like anything.  *share_write*
    (raw only) lets other processes write at the same time, as QEMU's ``share-rw`` does.  *direct*
    passes the page cache of this host by; only so can an inactive file be read.

    Raises StorageError if there is no such image or it cannot be used so, its subclass ImageLocked
    if another process has it, UsageError for what cannot be asked for.
    """
    if isinstance(where, str) and where.startswith(SCHEMES):
        if format != "raw" or share_write or direct:
            raise UsageError(f"{where}: format, sharing and cache are the NBD server's business")
        return StoredImage(NbdStorage(where, read_only=read_only), active=active)
    path = Path(where)
    if format == "raw":
        raw = RawStorage(path, read_only=read_only, share_write=share_write, direct=direct)
        return StoredImage(raw, active=active)
    if share_write:
        raise UsageError(f"{path}: a {format} image cannot be shared: it has state of its own")
    storage = DaemonStorage(path, format, read_only=read_only, direct=direct)
    return StoredImage(storage, active=active)
