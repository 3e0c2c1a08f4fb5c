"""What a source can send: a machine at rest, as a checkpoint is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.configuration import Configuration
from vmferry.wire.ram import RamBlock


class PageStore(Protocol):
    """The content of a RAM block or a disk, in pages."""

    @property
    def sums(self) -> npt.NDArray[np.uint64]:
        """A number for each page, 0 for a zero page."""

    def read(self, offset: int, *buffers: memoryview) -> None:
        """Fill *buffers*, one behind the other, with the bytes from *offset* on.

        May be called by several threads.
        """


class Outgoing(Protocol):
    """A machine that does not run."""

    @property
    def configuration(self) -> Configuration | None:
        """The machine type and what goes with it; ``None`` before QEMU 2.4."""

    @property
    def page_size(self) -> int:
        """Bytes of a target page."""

    @property
    def footers(self) -> bool:
        """Whether sections end with a footer."""

    @property
    def blocks(self) -> Sequence[RamBlock]:
        """Guest memory, in the order of the block list."""

    def memory(self, block: RamBlock) -> PageStore | None:
        """The content of a block; ``None`` where both sides share it."""

    @property
    def disks(self) -> Sequence[tuple[str, PageStore]]:
        """Disks that move along, with their names; pages of 1 MiB."""

    @property
    def bitmaps(self) -> Iterable[BitmapRecord]:
        """Dirty bitmaps, as the records of their section; asked for more than once."""

    @property
    def numbers(self) -> frozenset[int]:
        """Section numbers in use by the devices."""

    @property
    def early(self) -> Sequence[bytes]:
        """Device sections that stand before guest memory, whole."""

    @property
    def devices(self) -> Sequence[bytes]:
        """The other device sections, whole."""

    @property
    def description(self) -> bytes | None:
        """The closing description."""
