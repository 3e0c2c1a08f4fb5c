"""vCPUs on the Unicorn emulator: one engine each, over the same memory of this process.

Two things are not as on a processor.  An engine is run by one thread and knows nothing of the
others, so atomic instructions are atomic on one vCPU only.  And an engine that is stopped looks for
that behind each load and each store, and goes on from the beginning of the instruction
(``check_exit_request`` of Unicorn 2.1): one that reads, changes and writes the same memory, such as
``inc [rbx]``, may change it twice, and a load from a device may happen twice.  Stopping between
instructions (``count`` of ``emu_start``) would be exact, and makes the guest three times slower.

Guest-physical memory that is neither RAM nor in the hole for devices, from 3 to 4 GiB, ends the
machine when it is touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import unicorn
from unicorn import x86_const as x86

from vmferry.errors import MachineError
from vmferry.machines.addresses import HOLE_END, HOLE_START
from vmferry.machines.cpu import Bus, Exit
from vmferry.machines.cpu_state import CpuState

from .registers import read_registers, write_registers

# The package has no types of its own.
_Engine: Any = unicorn.Uc  # type: ignore[attr-defined]
_EngineError: type[Exception] = unicorn.UcError  # type: ignore[attr-defined]
_NEVER: Final = (1 << 64) - 1
"""An address that no instruction has: run until something else ends it."""


class UnicornHost:
    """Makes vCPUs that reach *bus* (:class:`~vmferry.machines.cpu.CpuHost`)."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._memory: list[tuple[int, int, int]] = []

    def map(self, start: int, address: int, size: int) -> None:
        """As :meth:`~vmferry.machines.cpu.CpuHost.map`."""
        self._memory.append((start, address, size))

    def dirty_slots(self) -> None:
        """As :meth:`~vmferry.machines.cpu.CpuHost.dirty_slots`: there is no log."""

    def add_vcpu(self) -> UnicornVcpu:
        """As :meth:`~vmferry.machines.cpu.CpuHost.add_vcpu`."""
        return UnicornVcpu(self._bus, self._memory)

    def close(self) -> None:
        """Nothing is held but by the vCPUs."""


class UnicornVcpu:
    """One engine (:class:`~vmferry.machines.cpu.Vcpu`)."""

    def __init__(self, bus: Bus, memory: list[tuple[int, int, int]]) -> None:
        self._bus = bus
        self._lock = threading.Lock()  # of the next two
        self._inside = False
        self._kicked = False
        self._error: Exception | None = None
        self._engine = engine = _Engine(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self._where = ""
        for start, address, size in memory:
            engine.mem_map_ptr(start, size, unicorn.UC_PROT_ALL, address)
        engine.hook_add(unicorn.UC_HOOK_INSN, self._in, None, 1, 0, x86.UC_X86_INS_IN)
        engine.hook_add(unicorn.UC_HOOK_INSN, self._out, None, 1, 0, x86.UC_X86_INS_OUT)
        engine.hook_add(unicorn.UC_HOOK_MEM_INVALID, self._invalid)
        engine.mmio_map(HOLE_START, HOLE_END - HOLE_START, self._load, None, self._store, None)

    def run(self) -> Exit:
        """As :meth:`~vmferry.machines.cpu.Vcpu.run`."""
        with self._lock:
            if self._kicked:
                self._kicked = False
                return Exit.KICKED
            self._inside = True
        try:
            self._emulate()
        finally:
            with self._lock:
                self._inside = False
                kicked, self._kicked = self._kicked, False
        # Without an error and without a kick, nothing but `hlt` ends a run.
        return Exit.KICKED if kicked else Exit.HALTED

    def kick(self) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.kick`; may be lost as the run begins."""
        with self._lock:
            self._kicked = True
            if self._inside:
                self._engine.emu_stop()

    def read(self, state: CpuState) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.read`."""
        read_registers(self._engine, state)

    def write(self, state: CpuState) -> None:
        """As :meth:`~vmferry.machines.cpu.Vcpu.write`; segments are read from the guest's GDT."""
        write_registers(self._engine, state)

    def _emulate(self) -> None:
        self._error = None
        start = self._engine.reg_read(x86.UC_X86_REG_RIP)
        try:
            self._engine.emu_start(start, _NEVER)
        except _EngineError as error:
            rip = self._engine.reg_read(x86.UC_X86_REG_RIP)
            raise MachineError(f"the guest failed at {rip:#x}{self._where}: {error}") from error
        finally:
            if self._error is not None:
                raise self._error

    # Called by the engine, through native frames, which no error can cross

    def _in(self, _engine: Any, port: int, size: int, _data: Any) -> int:
        return self._ask(lambda: self._bus.port_read(port, size), size)

    def _out(self, _engine: Any, port: int, size: int, value: int, _data: Any) -> None:
        self._tell(lambda: self._bus.port_write(port, size, value))

    def _load(self, _engine: Any, offset: int, size: int, _data: Any) -> int:
        return self._ask(lambda: self._bus.memory_read(HOLE_START + offset, size), size)

    def _store(self, _engine: Any, offset: int, size: int, value: int, _data: Any) -> None:
        self._tell(lambda: self._bus.memory_write(HOLE_START + offset, size, value))

    def _invalid(
        self, _engine: Any, _access: int, address: int, size: int, _value: int, _data: Any
    ) -> bool:
        self._where = f", {size} bytes at {address:#x}"
        return False

    def _ask(self, access: Callable[[], int], size: int) -> int:
        try:
            value = access()
        except Exception as error:  # noqa: BLE001  (raised when the engine has returned)
            value = self._stop(error, size)
        if self._kicked:
            self._engine.emu_stop()
        return value

    def _tell(self, access: Callable[[], None]) -> None:
        try:
            access()
        except Exception as error:  # noqa: BLE001  (raised when the engine has returned)
            self._stop(error, 0)
        if self._kicked:
            self._engine.emu_stop()

    def _stop(self, error: Exception, size: int) -> int:
        self._error = self._error or error
        self._engine.emu_stop()
        return (1 << 8 * size) - 1
