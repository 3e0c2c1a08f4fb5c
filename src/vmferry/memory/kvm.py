"""The dirty log of KVM, joined with ``userfaultfd`` for what the host writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from vmferry.pages import count_pages

from .bits import Bitmap, gathered, get_bits, set_bits
from .blocks import GuestMemory, MemoryBlock
from .holes import PAGE_SIZE, populated
from .userfaultfd import UserfaultfdLog


class Slot(Protocol):
    """A range of guest-physical memory that is a part of a block."""

    @property
    def address(self) -> int:
        """Where it begins in this process."""

    @property
    def size(self) -> int:
        """Its bytes."""

    @property
    def read_only(self) -> bool:
        """Whether the guest cannot write it."""


SlotType = TypeVar("SlotType", bound=Slot)


class KvmSlots(Protocol[SlotType]):
    """The memory slots of a VM of KVM (``KVM_SET_USER_MEMORY_REGION``)."""

    @property
    def slots(self) -> tuple[SlotType, ...]:
        """All there are by now."""

    def log(self, slot: SlotType, *, on: bool) -> None:
        """Turn ``KVM_MEM_LOG_DIRTY_PAGES`` on or off."""

    def collect(self, slot: SlotType) -> npt.NDArray[np.uint64]:
        """What ``KVM_GET_DIRTY_LOG`` reports, a bit for each page of the slot."""


class KvmLog(Generic[SlotType]):
    """What virtual CPUs write, by KVM's log, and what the host writes, by ``userfaultfd``.

    KVM's log sees neither what threads of this process write nor what its kernel does.  It is the
    cheaper one for a virtual CPU, if that writes through :meth:`GuestMemory.map_for_vcpus`;
    otherwise ``userfaultfd`` makes it pay as well.  A slot must not be removed while it is logged.
    """

    name: Final = "kvm"

    def __init__(self, memory: GuestMemory, kvm: KvmSlots[SlotType]) -> None:
        self._kvm = kvm
        self._host = UserfaultfdLog(memory, host_only=True)
        self._memory = memory
        self._logged: list[SlotType] = []
        self._cleanup = ExitStack()

    def start(self) -> None:
        """See :meth:`DirtyLog.start`."""
        self.stop()
        with ExitStack() as cleanup:
            cleanup.callback(self._host.stop)
            self._host.start()
            cleanup.callback(self._leave)
            for block in self._memory.blocks:
                for slot, _ in self._slots(block):
                    self._take_up(slot)
            self._cleanup = cleanup.pop_all()

    def stop(self) -> None:
        """See :meth:`DirtyLog.stop`."""
        self._cleanup.close()

    def content(self, block: MemoryBlock) -> memoryview:
        """See :meth:`DirtyLog.content`."""
        return block.image

    def collect(self, block: MemoryBlock, into: Bitmap) -> int:
        """See :meth:`DirtyLog.collect`."""
        with gathered(block, into) as found:
            self._host.collect(block, found)
            for slot, first in self._slots(block):
                pages = slot.size // PAGE_SIZE
                if slot in self._logged:
                    written = get_bits(self._kvm.collect(slot), pages)
                else:
                    # It is new, and nobody noted what was written to it so far.
                    self._take_up(slot)
                    written = populated(block.fd, slot.address, first, first + pages)
                set_bits(found, first, written)
        return count_pages(found)

    def _slots(self, block: MemoryBlock) -> Iterator[tuple[SlotType, int]]:
        """The slots that show the block to the guest and may be written, with their first page."""
        for slot in self._kvm.slots:
            for address in block.addresses:
                if address <= slot.address < address + block.size and not slot.read_only:
                    yield slot, (slot.address - address) // PAGE_SIZE

    def _take_up(self, slot: SlotType) -> None:
        self._kvm.log(slot, on=True)
        self._logged.append(slot)

    def _leave(self) -> None:
        while self._logged:
            self._kvm.log(self._logged.pop(), on=False)
