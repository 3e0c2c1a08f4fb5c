"""The seam between the board and what runs its processors: a host of vCPUs, KVM or an emulator.

The board owns memory, devices and threads.  A host makes vCPUs over guest-physical memory; each
is run by a thread of its own (:mod:`.runner`), and hands what it cannot do by itself to the
:class:`Bus`: accesses to ports and to memory that is not mapped.  Everything is x86-64.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from vmferry.memory.kvm import KvmSlots

    from .cpu_state import CpuState


class Exit(Enum):
    """Why :meth:`Vcpu.run` returned."""

    KICKED = auto()
    """Another thread asked for it, or for no reason: it may be run again at once."""
    HALTED = auto()
    """The guest executed ``hlt``; the program counter is behind it."""


class Bus(Protocol):
    """The board's devices, as vCPUs reach them; called in the threads of the vCPUs.

    Sizes are 1, 2, 4 and for memory also 8 bytes; values are unsigned, of that size.  Of a string
    instruction (``rep outsb``) every element is an access of its own, in order.  What no device
    answers reads as all ones and ignores writes.  An error that a method raises has to come out
    of :meth:`Vcpu.run`.
    """

    def port_read(self, port: int, size: int) -> int:
        """``in``: the value of *size* bytes at *port*."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """``out``: *value* of *size* bytes goes to *port*."""

    def memory_read(self, address: int, size: int) -> int:
        """A load of *size* bytes from the guest-physical *address*, where no memory is."""

    def memory_write(self, address: int, size: int, value: int) -> None:
        """A store of *size* bytes to the guest-physical *address*, where no memory is."""


class Vcpu(Protocol):
    """One processor.  Between two calls of :meth:`run` no instruction of it is half done.

    So an access that was handed to the bus is completed, in registers and program counter, before
    ``run`` returns, also when it was kicked meanwhile.
    """

    def run(self) -> Exit:
        """Run the guest in the calling thread; always the same thread.

        Raises :class:`~vmferry.errors.MachineError` where the host cannot go on with the guest, as
        after a triple fault.
        """

    def kick(self) -> None:
        """Make :meth:`run` return soon, from any thread; the vCPU's own (in the bus) included.

        A kick from before ``run`` was entered makes it return at once if the host can tell, and
        may be lost if not: whoever needs it repeats it.
        """

    def read(self, state: CpuState) -> None:
        """Fill *state* with what the vCPU holds; it is not in :meth:`run`."""

    def write(self, state: CpuState) -> None:
        """Make the vCPU hold *state*; it is not in :meth:`run`.

        Raises ``ValueError`` for what this host cannot take, with the name of the field.
        """


class CpuHost(Protocol):
    """Where vCPUs come from: made with the bus, ``KvmHost(bus)``; closed by the board at the end.

    Threads do not run any more when it is closed.
    """

    def map(self, start: int, address: int, size: int) -> None:
        """Put memory of this process at the guest-physical address *start*.

        *address* is where it begins in this process; all three are multiples of 4096.  Ranges do
        not overlap, are mapped before the first vCPU is made, and stay as long as the host does.
        """

    def dirty_slots(self) -> KvmSlots[Any] | None:
        """The memory, to whoever logs what is written to it; ``None`` for a host without a log."""

    def add_vcpu(self) -> Vcpu:
        """One more vCPU, numbered from 0 on (its APIC id), in the state after a reset."""

    def close(self) -> None:
        """Give everything back; again is harmless."""
