"""What keeps the record: something that can compare and swap, and may know who is gone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from vmferry.errors import StorageError, UsageError, printable

from .protocol import Swap
from .record import Record


class StoreSilent(StorageError):
    """The store gave no answer in time, or none that counts; it may give one later."""


class Outcome(StrEnum):
    """What became of a swap."""

    LANDED = "landed"
    LOST = "lost"
    """Something else was there than what was compared with, and nothing has changed."""
    NOT_GONE = "not-gone"
    """The engine that had to be gone is not known to be, and nothing has changed."""
    UNKNOWN = "unknown"
    """It may have landed, or may still land."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A record as it was read, and the store's own mark for that; ``None`` where there is none."""

    record: Record | None
    mark: bytes


class Store(Protocol):
    """Where one record is; any thread may call, and no call takes much longer than its deadline.

    What raises is a :class:`~vmferry.errors.StorageError`: :class:`StoreSilent` where asking again
    may help.
    """

    @property
    def uri(self) -> str:
        """What :func:`open_store` opens as this one."""

    @property
    def term(self) -> float | None:
        """Seconds after which an engine that was not heard of counts as gone; ``None``: never."""

    def read(self) -> Seen:
        """The record that counts at some instant between call and return."""

    def swap(self, seen: Seen, swap: Swap) -> Outcome:
        """Put ``swap.record`` in the place of what was *seen*, if that is still there."""

    def gone(self, name: str) -> bool:
        """Whether the engine *name* is certainly not running any more, and never will."""

    def keep(self, name: str, seen: Seen | None) -> bool:
        """Say that the engine *name* is alive, for one more term.

        Once its term has ended it is alive again only if *seen* is still the record, at the same
        instant; false where it is not.
        """

    def leave(self, name: str) -> None:
        """Say that the engine *name* has ended."""


def record_beside(image: str) -> str:
    """The URI of the record that is kept beside an image, if nothing else is said."""
    return f"file:{image}.owner"


def open_store(uri: str) -> Store:
    """The store that *uri* names: ``file:PATH``, or ``etcd://HOST:PORT/KEY`` (``?term=SECONDS``).

    Raises :class:`~vmferry.errors.UsageError` for what is neither; nothing is asked yet.
    """
    from .etcd_store import EtcdStore  # noqa: PLC0415
    from .file_store import FileStore  # noqa: PLC0415

    if uri.startswith("file:") and len(uri) > len("file:"):
        return FileStore(uri.removeprefix("file:"))
    if uri.startswith("etcd://"):
        return EtcdStore.of(uri)
    raise UsageError(f"expected file:PATH or etcd://HOST:PORT/KEY, found {printable(uri)}")
