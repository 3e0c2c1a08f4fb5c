"""Where a received machine goes: into a checkpoint, later into a machine that runs."""

from __future__ import annotations

from typing import Any, Protocol

from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.disk import DiskChunk
from vmferry.wire.framed import Frame
from vmferry.wire.ram import RamBlocks, RamPages
from vmferry.wire.sections import SectionStart
from vmferry.wire.split import DecodedDevices

from .runs import Runs


class Sink(Protocol):
    """Takes what a destination receives, in the order of the stream.

    Views in what it is given are lent for the call alone.  :meth:`pages` is called from several
    threads at once, never for the same page at the same time.  Nothing counts before
    :meth:`commit` has returned.
    """

    def configuration(self, configuration: Configuration | None, page_size: int) -> None:
        """The machine, and the size of its pages in bytes; before anything else."""

    def ram_blocks(self, blocks: RamBlocks) -> None:
        """The machine's memory, all zeros until pages come."""

    def pages(self, batch: RamPages) -> None:
        """Pages of one block; those that came before are overwritten."""

    def disk_chunk(self, chunk: DiskChunk) -> None:
        """1 MiB of a disk."""

    def bitmap(self, record: BitmapRecord) -> None:
        """A piece of a dirty bitmap."""

    def device(self, section: DeviceSection | DeviceRegion, *, early: bool) -> None:
        """The state of a device; *early* where it stood before guest memory.

        A region holds all devices of a stream in which nothing tells them apart.
        """

    def description(self, description: VmDescription) -> None:
        """What the stream says of its own devices."""

    def commit(self, features: frozenset[str], *, footers: bool) -> None:
        """Everything is there: make it durable.

        *features* are the source's capabilities as far as the stream showed them, under QEMU's
        names; *footers* whether sections end with one.
        """

    def discard(self) -> None:
        """The source keeps its machine after all: what was committed must not look complete."""


class Loader(Protocol):
    """Who has a machine's memory, and knows its devices and handlers by what they declare."""

    def decode(self, head: SectionStart, data: memoryview, offset: int) -> tuple[int, Any]:
        """Decode the state of a device; see :data:`vmferry.wire.split.Decode`."""

    def room(self, block: str, runs: Runs) -> memoryview:
        """The memory of a block, to receive pages into; by any thread, as :meth:`Sink.pages`."""

    def disks_sent(self) -> None:
        """A section of disks has ended, and others may follow."""

    def devices(self, decoded: DecodedDevices) -> None:
        """What :meth:`decode` made of the device sections, in their order."""

    def piece(self, head: SectionStart, frame: Frame) -> None:
        """A piece of the iterable section that *head* began."""
