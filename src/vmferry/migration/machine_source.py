"""A machine that runs, as what a source sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from vmferry.memory import PAGE_SIZE
from vmferry.wire.bitmap import BitmapRecord
from vmferry.wire.configuration import Configuration
from vmferry.wire.layout import IGNORE_SHARED
from vmferry.wire.ram import RamBlock

from .bitmaps import DirtyBitmap
from .capabilities import Capability
from .machine import LiveMachine
from .outgoing import PageStore
from .pieces import Pieces
from .registry import Registry
from .run_state import PAUSED, RUNNING, RunState
from .saving import Description, closing_description, device_sections


class MachineSource:
    """An ``Outgoing`` whose devices are saved when they are asked for first: stop it before."""

    page_size = PAGE_SIZE
    footers = True
    disks: Sequence[tuple[str, PageStore]] = ()
    early: Sequence[bytes] = ()

    def __init__(
        self,
        machine: LiveMachine,
        capabilities: frozenset[Capability],
        bitmaps: Iterable[DirtyBitmap],
    ) -> None:
        self._machine = machine
        self._bitmaps = tuple(bitmaps) if Capability.DIRTY_BITMAPS in capabilities else ()
        self.was_running = machine.running
        """Whether it ran when it was stopped for the switchover, or before that does."""
        self.stood_as = PAUSED
        """Its run state if it did not."""
        self._ignore_shared = Capability.IGNORE_SHARED in capabilities
        self.configuration = Configuration(
            machine.name,
            capabilities=(IGNORE_SHARED,) if self._ignore_shared else (),
            uuid=machine.uuid if Capability.VALIDATE_UUID in capabilities else None,
        )

    @property
    def bitmaps(self) -> Iterator[BitmapRecord]:
        """Dirty bitmaps, with the bits that they have when those are asked for."""
        yield from (bitmap.start() for bitmap in self._bitmaps)
        for bitmap in self._bitmaps:
            yield from bitmap.bits()

    @property
    def blocks(self) -> list[RamBlock]:
        """All RAM blocks, also those whose content is not sent."""
        address = 0 if self._ignore_shared else None
        memory = self._machine.memory
        return [RamBlock(block.name, block.size, None, address) for block in memory.blocks]

    def memory(self, block: RamBlock) -> PageStore | None:  # noqa: ARG002
        """Nothing: the memory of a running machine goes in rounds."""
        return None

    @property
    def numbers(self) -> frozenset[int]:
        """Section numbers of handlers, devices, and the run state behind them."""
        registry = self._machine.registry
        return frozenset(range(len(registry.handlers) + len(registry.devices) + 1))

    @cached_property
    def _saved(self) -> list[tuple[bytes, Description]]:
        registry = self._machine.registry
        behind = Registry()
        behind.register(RunState.of(RUNNING if self.was_running else self.stood_as))
        first = len(registry.handlers)
        last = first + len(registry.devices)
        return [*device_sections(registry, first), *device_sections(behind, last)]

    @property
    def devices(self) -> list[bytes]:
        """The device sections."""
        return [section for section, _ in self._saved]

    @cached_property
    def description(self) -> bytes:
        """The closing description."""
        pieces = Pieces(self._machine.registry.handlers, 0, lambda _: None)
        texts = [*pieces.descriptions, *(text for _, text in self._saved)]
        return closing_description(PAGE_SIZE, texts)[5:]
