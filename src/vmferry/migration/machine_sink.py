"""A machine that waits for its state, as where a destination puts what it receives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vmferry.errors import PeerError, StreamError, printable
from vmferry.memory import PAGE_SIZE
from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription
from vmferry.wire.devices import DeviceRegion, DeviceSection
from vmferry.wire.disk import DiskChunk
from vmferry.wire.framed import Frame
from vmferry.wire.layout import IGNORE_SHARED
from vmferry.wire.ram import RamBlocks, RamPages
from vmferry.wire.sections import SectionStart
from vmferry.wire.split import DecodedDevices

from .bitmaps import DirtyBitmaps, IncomingBitmaps
from .incoming import IncomingBlock
from .incoming_disks import IncomingDisks
from .loading import Staging, load_piece
from .machine import LiveMachine
from .registry import Handler, Registry
from .run_state import RUNNING, RunState
from .runs import Runs


class MachineSink:
    """Loads *machine*, which does not run; its *disks*, where they come with it; its *bitmaps*.

    Where anything does not fit, an error is raised before any device has changed; memory may have.
    """

    def __init__(
        self,
        machine: LiveMachine,
        disks: IncomingDisks | None = None,
        bitmaps: DirtyBitmaps | None = None,
    ) -> None:
        self._machine = machine
        self._disks = disks
        self._bitmaps = None if bitmaps is None else IncomingBitmaps(bitmaps)
        self._run_state = RunState.of(RUNNING)
        behind = Registry()
        behind.register(self._run_state)
        self._staging = Staging(machine.registry, behind)
        self._blocks: dict[str, IncomingBlock] = {}
        self._handlers: dict[int, Handler] = {}
        self._is_known = False
        self._ignores_shared = False
        self._received: Mapping[str, npt.NDArray[np.uint8]] = {}
        self._configuration: tuple[Configuration | None, int] = None, 0

    def configuration(self, configuration: Configuration | None, page_size: int) -> None:
        """Take note of which machine it is; another one is refused when its source listens."""
        self._configuration = configuration, page_size

    def mark(self, received: Mapping[str, npt.NDArray[np.uint8]]) -> None:
        """Mark the pages that come behind the next list of blocks, in an array for each.

        Those from before are let go of, and the blocks with them: no pages come any more.
        """
        self._received, self._blocks = received, {}

    def _check_configuration(self) -> None:
        configuration, page_size = self._configuration
        machine = self._machine
        if configuration is None:
            raise StreamError(f"the name of the machine {printable(machine.name)}", "none")
        if configuration.machine != machine.name:
            raise StreamError(
                f"a machine {printable(machine.name)}", printable(configuration.machine)
            )
        if page_size != PAGE_SIZE:
            raise StreamError(f"pages of {PAGE_SIZE} bytes", f"pages of {page_size}")
        if configuration.uuid not in {None, machine.uuid}:
            raise StreamError(f"the machine with UUID {machine.uuid}", str(configuration.uuid))
        if unknown := set(configuration.capabilities) - {IGNORE_SHARED}:
            raise StreamError("no capability but x-ignore-shared", ", ".join(sorted(unknown)))
        self._ignores_shared = bool(configuration.capabilities)

    def ram_blocks(self, blocks: RamBlocks) -> None:
        """Refuse another machine, and other memory than this one has."""
        self._check_configuration()
        wanted = {block.name: block for block in self._machine.memory.blocks}
        found = {block.name: block.length for block in blocks.blocks}
        for name, length in found.items():
            if name not in wanted:
                raise StreamError("a RAM block that this machine has", printable(name))
            if length != wanted[name].size:
                raise StreamError(f"{wanted[name].size} bytes", str(length), block=name)
        if missing := wanted.keys() - found.keys():
            raise StreamError(f"RAM block {printable(min(missing))} as well", "no such block")
        for block in self._machine.memory.blocks:
            if not (block.shared and self._ignores_shared):
                block.check_alone()
        self._blocks = {
            name: IncomingBlock(block, self._received.get(name))
            for name, block in wanted.items()
            if not (block.shared and self._ignores_shared)
        }
        self._is_known = True

    def pages(self, batch: RamPages) -> None:
        """Put pages in their place."""
        name = batch.block.name
        block = self._incoming(name)
        try:
            block.place(batch.rows, batch.data)
        except StreamError as error:
            error.place = replace(error.place, offset=batch.start + (error.place.offset or 0))
            raise error.within(section="ram", block=name) from None

    def room(self, block: str, runs: Runs) -> memoryview:
        """The memory of a block, to receive pages into."""
        return self._incoming(block).room(runs)

    def _incoming(self, name: str) -> IncomingBlock:
        if name not in self._blocks:
            raise StreamError("no content of a block that both sides share", "a page", block=name)
        return self._blocks[name]

    def disk_chunk(self, chunk: DiskChunk) -> None:
        """Fill a disk, where it is this side's own."""
        if self._disks is None:
            raise PeerError(
                "the source sends its disks: turn block on here as well, where this machine has"
                " images of its own, or off there"
            )
        if not self._is_known:
            raise StreamError("disks behind the list of guest memory", "a chunk before it")
        self._disks.take(chunk)

    def disks_sent(self) -> None:
        """Make durable what has come, while more does."""
        if self._disks is not None and self._is_known:
            self._disks.flush()

    def bitmap(self, record: BitmapRecord) -> None:
        """Take note of a piece of one."""
        if self._bitmaps is None:
            raise StreamError("no dirty bitmap for this machine", printable(record.node))
        self._bitmaps.take(record)

    framed = True

    def piece(self, head: SectionStart, frame: Frame) -> None:
        """Give a piece to its handler."""
        handler = self._handlers.get(head.number)
        if handler is None:
            handler = self._handlers[head.number] = self._staging.start(head, None)
        load_piece(handler, frame, head.version)

    def decode(self, head: SectionStart, data: memoryview, offset: int) -> tuple[int, Any]:
        """Decode the state of a device."""
        return self._staging.decode(head, data, offset)

    def devices(self, decoded: DecodedDevices) -> None:
        """Take note of what was decoded."""
        self._staging.take(decoded)

    def device(self, section: DeviceSection | DeviceRegion, *, early: bool) -> None:
        """Take note of devices that could not be decoded as they came: :meth:`commit` says why."""
        if early:
            raise StreamError("devices behind guest memory", "one before it", section=section.name)
        self._staging.take(section)

    def description(self, description: VmDescription) -> None:
        """Nothing: what the devices are made of is declared."""

    def commit(self, features: frozenset[str], *, footers: bool) -> None:  # noqa: ARG002
        """Load all devices; what came of disks is durable."""
        self._check_content()
        if self._disks is not None:
            self._disks.finish()
        self._staging.finish()
        if self._bitmaps is not None:
            self._bitmaps.finish()
        self._staging.commit()

    def _check_content(self) -> None:
        # Not in the frame of what may fail behind it: that is kept, and with it what it names.
        for name, block in self._blocks.items():
            # Of others every page has come once, zeros too.
            if self._ignores_shared and not block.has_content:
                raise StreamError(
                    "the content of a block that is not shared here",
                    "none, as the source left out what it shares",
                    section="ram",
                    block=name,
                )

    def discard(self) -> None:
        """Nothing: the machine does not run, and is loaded once."""

    @property
    def run_state(self) -> str:
        """What the machine did before it was stopped for the migration."""
        return self._run_state.name
