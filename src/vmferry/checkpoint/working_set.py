"""The working set of a saved machine: which pages it asked for first when it was resumed.

It stands beside the manifest, in ``working-set.bin``, and is no part of the machine: it may be
missing, old or wrong, and only costs time then.  Replaced as a whole, so that restores that run at
the same time leave that of one of them.

Pages that are sent before they are asked for are never seen to be needed.  So one in
``_SAMPLE`` of them is held back in each restore: asked for again it stays, otherwise it loses
trust, and leaves the set with the last of it.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import CheckpointDamaged

from .files import open_inside

NAME: Final = "working-set.bin"

_MAX: Final = 1 << 20
"""Pages in a set, 4 GiB of small ones."""

_MAGIC: Final = b"vmferry working set 2\n".ljust(24, b"\0")
_HEAD: Final = struct.Struct("<24sIIII")
"""Magic, entries behind the head, and the three numbers of the last restores; little-endian."""

_SAMPLE: Final = 16
_TRUST: Final = 2

_ENTRY: Final = np.dtype([("block", "<u2"), ("page", "<u4"), ("trust", "u1"), ("when", "<u4")])
_LATE: Final = 0xFFFFFFFF

Entries = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Pages in the order in which they were wanted; a page is a target page of a block.

    ``when`` of an entry is in microseconds since the connection, as it was asked for the last time.

    ``restores`` counts those that it is made of; in the last of them ``pushed`` pages were sent
    before anybody asked, and ``asked`` were asked for.
    """

    entries: Entries
    restores: int = 0
    asked: int = 0
    pushed: int = 0

    @property
    def coverage(self) -> float | None:
        """Share of the pages wanted at the last restore that were there; ``None`` if unknown."""
        wanted = self.asked + self.pushed
        return self.pushed / wanted if self.restores > 1 and wanted else None

    def split(self) -> tuple[list[tuple[int, int]], set[tuple[int, int]]]:
        """What to send first, and what of the set to hold back this time."""
        pages = list(
            zip(self.entries["block"].tolist(), self.entries["page"].tolist(), strict=True)
        )
        held = set(pages[self.restores % _SAMPLE :: _SAMPLE]) if self.restores > 1 else set()
        return [page for page in pages if page not in held], held

    def after(
        self, asked: Sequence[tuple[int, int, float]], held: set[tuple[int, int]]
    ) -> WorkingSet:
        """The set behind a restore in which *asked* were asked for, in this order.

        Block, page, and seconds since the connection.
        """
        wanted: dict[tuple[int, int], int] = {}
        for block, page, seconds in asked:
            wanted.setdefault((block, page), min(int(seconds * 1e6), _LATE))
        count = len(wanted)
        rows = []
        for block, page, trust, when in self.entries.tolist():
            if (block, page) in wanted:
                rows.append((block, page, _TRUST, wanted.pop((block, page))))
            elif (block, page) not in held:
                rows.append((block, page, trust, when))
            elif trust > 1:
                rows.append((block, page, trust - 1, when))
        rows += [(block, page, _TRUST, when) for (block, page), when in wanted.items()]
        pushed = len(self.entries) - len(held)
        entries = np.array(rows[:_MAX], _ENTRY)
        return WorkingSet(entries, self.restores + 1, count, pushed)


def read(directory: Path, pages: Sequence[int]) -> WorkingSet:
    """The set of a checkpoint whose blocks have so many *pages*; empty where there is none."""
    empty = WorkingSet(np.zeros(0, _ENTRY))
    try:
        descriptor = open_inside(directory, NAME)
    except (OSError, CheckpointDamaged):
        return empty
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(_HEAD.size + _MAX * _ENTRY.itemsize + 1)
    except OSError:
        return empty
    if len(data) < _HEAD.size:
        return empty
    magic, count, restores, asked, pushed = _HEAD.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEAD.size + count * _ENTRY.itemsize or count > _MAX:
        return empty
    entries = np.frombuffer(data, _ENTRY, count, _HEAD.size)
    known = entries["block"] < len(pages)
    most = np.asarray([*pages, 0])[np.where(known, entries["block"], len(pages))]
    return WorkingSet(entries[entries["page"] < most], restores, asked, pushed)


def write(directory: Path, new: WorkingSet) -> None:
    """Keep *new* in place of what is there; does nothing where the directory cannot be written."""
    numbers = (new.restores, new.asked, new.pushed)
    head = _HEAD.pack(_MAGIC, len(new.entries), *(min(n, 0xFFFFFFFF) for n in numbers))
    # Restores may end at the same time, in one process too, and the name must lead nowhere else.
    partial = directory / f"{NAME}.{secrets.token_hex(8)}.partial"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError):
        descriptor = os.open(partial, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(head + new.entries.tobytes())
            partial.replace(directory / NAME)
        finally:
            partial.unlink(missing_ok=True)


def units_of(pages: Iterable[tuple[int, int]], per_unit: Sequence[int]) -> list[tuple[int, int]]:
    """Pages as units of so many pages in each block, each once."""
    return list(dict.fromkeys((block, page // per_unit[block]) for block, page in pages))
