"""One vCPU of KVM: its run loop, its exits, its state."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from vmferry.machines.cpu import Bus, Exit
from vmferry.machines.cpu_state import CpuState
from vmferry.machines.cpu_subsections import Cpuid

from . import abi, kick, msrs, registers
from .abi import Reason, RunHeader
from .cpuid import check_cpuid, pack, unpack
from .failures import CpuFailure
from .xsave import Places

_UNION: Final = 32
"""Where the part of ``kvm_run`` is that depends on the reason."""
_OUT: Final = 1


class KvmVcpu:
    """The vCPU *number* (:class:`~vmferry.machines.cpu.Vcpu`), behind the descriptor *fd*.

    The TSC counts on while the guest is paused.  When a state is loaded it goes on from there as
    the guest is run next, so that the time between saving and running is not in it; vCPUs whose
    counters were less than a second apart get the same offset from KVM, and so the same time.
    """

    def __init__(
        self,
        fd: int,
        number: int,
        bus: Bus,
        *,
        run_size: int,
        area: int,
        cpuid: Cpuid,
        listed_msrs: tuple[int, ...],
    ) -> None:
        self._fd = fd
        self._number = number
        self._bus = bus
        self._map = mmap.mmap(fd, run_size)
        self._header = RunHeader.from_buffer(self._map)
        self._lock = threading.Lock()  # of who is in KVM_RUN
        self._inside: int | None = None
        self._thread: int | None = None
        self._started = False
        self._own_cpuid = cpuid
        self._cpuid = pack(cpuid)
        self._places = Places.of(cpuid, area)
        self._tsc: int | None = None
        registers.set_cpuid(fd, self._cpuid)
        self._msrs = msrs.travelling(fd, listed_msrs)
        self._area = area
        self._reset = self._fetch()

    # Running

    def run(self) -> Exit:
        """As :meth:`~vmferry.machines.cpu.Vcpu.run`; blocks one signal in the calling thread.

        That is :data:`.kick.SIGNAL`.  Raises :class:`CpuFailure` also for a triple fault.
        """
        with self._in_thread():
            self._set_tsc()
            while (reason := self._enter()) is not None:
                if reason is Reason.HLT:
                    return Exit.HALTED
                self._serve(reason)
            return Exit.KICKED

    def kick(self) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.kick`; one from before ``run`` is not lost."""
        self._header.immediate_exit = 1
        with self._lock:
            if self._inside is not None:
                kick.send_signal(self._inside)

    @contextmanager
    def _in_thread(self) -> Iterator[None]:
        thread = threading.get_ident()
        if self._thread != thread:
            kick.prepare_thread(self._fd)
            self._thread = thread
        with self._lock:
            self._inside = thread
        try:
            yield
        finally:
            with self._lock:
                self._inside = None
            kick.take_signal()

    def _enter(self) -> Reason | None:
        """Let the guest run until it needs something; ``None`` if it was interrupted."""
        self._started = True
        try:
            fcntl.ioctl(self._fd, abi.RUN, 0)
        except InterruptedError:
            self._header.immediate_exit = 0
            return None
        except OSError as error:
            raise self._failure(f"KVM cannot run it: {error.strerror}") from error
        try:
            return Reason(self._header.exit_reason)
        except ValueError:
            return Reason.UNKNOWN

    def _serve(self, reason: Reason) -> None:
        match reason:
            case Reason.IO | Reason.MMIO:
                try:
                    self._access(reason, self._bus)
                except BaseException:
                    self._abandon(reason)
                    raise
            case Reason.SHUTDOWN:
                raise self._failure("a triple fault")
            case Reason.FAIL_ENTRY:
                (why,) = struct.unpack_from(abi.FAIL_ENTRY, self._map, _UNION)
                raise self._failure(f"the processor refused to run it, with {why:#x}")
            case Reason.INTERNAL_ERROR:
                number, _ = struct.unpack_from(abi.INTERNAL_ERROR, self._map, _UNION)
                what = abi.INTERNAL_ERRORS.get(number, f"internal error {number}")
                raise self._failure(f"KVM cannot go on: {what}")
            case _:
                raise self._failure(f"an unexpected exit, reason {self._header.exit_reason}")

    def _failure(self, what: str) -> CpuFailure:
        known: dict[str, int] = {}
        with suppress(OSError):  # of a VM that is beyond telling
            known = registers.shown(self._fetch())
        return CpuFailure(f"vCPU {self._number}: {what}", known)

    # Accesses

    def _access(self, reason: Reason, bus: Bus) -> None:
        if reason is Reason.IO:
            self._port(bus)
        else:
            self._memory(bus)

    def _port(self, bus: Bus) -> None:
        direction, size, port, count, offset = struct.unpack_from(abi.IO_EXIT, self._map, _UNION)
        for at in range(offset, offset + count * size, size):
            if direction == _OUT:
                bus.port_write(port, size, int.from_bytes(self._map[at : at + size], "little"))
            else:
                self._map[at : at + size] = bus.port_read(port, size).to_bytes(size, "little")

    def _memory(self, bus: Bus) -> None:
        address, data, size, write = struct.unpack_from(abi.MMIO_EXIT, self._map, _UNION)
        if write:
            bus.memory_write(address, size, int.from_bytes(data[:size], "little"))
        else:
            at = _UNION + 8
            self._map[at : at + size] = bus.memory_read(address, size).to_bytes(size, "little")

    def _abandon(self, reason: Reason | None) -> None:
        """End the instruction whose access failed, as one that no device answers."""
        while reason is Reason.IO or reason is Reason.MMIO:
            self._access(reason, _Nothing())
            self._header.immediate_exit = 1
            reason = self._enter()

    # State

    def read(self, state: CpuState) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.read`."""
        held = self._fetch()
        if self._tsc is not None:
            held.msrs[msrs.TSC] = self._tsc
        registers.fill(state, held, self._places, self._reset)
        state.cpuid = unpack(self._cpuid)

    def write(self, state: CpuState) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.write`; what is refused changes nothing."""
        cpuid = self._cpuid
        if state.cpuid is not None:
            check_cpuid(state.cpuid, self._own_cpuid)
            cpuid = pack(state.cpuid)
        if cpuid != self._cpuid and self._started:
            raise ValueError("cpuid: a vCPU that has run keeps the one it has")
        wanted = registers.held_by(state, self._places, self._reset)
        before = self._fetch()
        try:
            self._put(wanted, cpuid)
        except ValueError:
            self._put(before, self._cpuid)
            raise
        self._cpuid, self._tsc = cpuid, state.msrs.tsc

    def _put(self, held: registers.Held, cpuid: bytes) -> None:
        if not self._started:
            registers.set_cpuid(self._fd, cpuid)
        registers.put(self._fd, held)
        # Without a local APIC in the kernel, KVM_RUN takes CR8 from here.
        self._header.cr8 = held.sregs.cr8

    def _fetch(self) -> registers.Held:
        return registers.fetch(self._fd, indices=self._msrs, area=self._area)

    def _set_tsc(self) -> None:
        if self._tsc is not None:
            msrs.write(self._fd, {msrs.TSC: self._tsc})
            self._tsc = None

    def close(self) -> None:
        """Give the vCPU back; it is not in :meth:`run`."""
        del self._header
        self._map.close()
        os.close(self._fd)


class _Nothing:
    """A bus without devices."""

    def port_read(self, port: int, size: int) -> int:  # noqa: ARG002
        """All ones."""
        return (1 << 8 * size) - 1

    def port_write(self, port: int, size: int, value: int) -> None:
        """Ignored."""

    def memory_read(self, address: int, size: int) -> int:  # noqa: ARG002
        """All ones."""
        return (1 << 8 * size) - 1

    def memory_write(self, address: int, size: int, value: int) -> None:
        """Ignored."""
