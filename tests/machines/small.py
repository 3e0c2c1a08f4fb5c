"""A machine of a few bytes: code in hex on a vCPU, and a bus that notes what it is asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from vmferry.machines.cpu import Exit
from vmferry.machines.cpu_state import RSP, CpuState, Segment
from vmferry.machines.kvm import KvmHost, KvmVcpu
from vmferry.memory import GuestMemory, MemoryBlock

CODE = 0x10000
DATA = 0x20000
DEVICE = 0xFEC00000
_TABLES = 0x1000
_LARGE = 2 << 20
_GIB = 1 << 30

DEADLINE = 60.0


@dataclass
class Recorder:
    """Answers reads with what ``answer`` gives, and keeps all accesses."""

    accesses: list[tuple[str, int, int, int]] = field(default_factory=list)
    answer: Callable[[int, int], int] = lambda _address, _size: 0
    noticed: Callable[[], None] = lambda: None

    def port_read(self, port: int, size: int) -> int:
        return self._read("in", port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        self._note("out", port, size, value)

    def memory_read(self, address: int, size: int) -> int:
        return self._read("load", address, size)

    def memory_write(self, address: int, size: int, value: int) -> None:
        self._note("store", address, size, value)

    def _read(self, what: str, address: int, size: int) -> int:
        value = self.answer(address, size)
        self._note(what, address, size, value)
        return value

    def _note(self, what: str, address: int, size: int, value: int) -> None:
        self.accesses.append((what, address, size, value))
        self.noticed()


@dataclass
class Small:
    """One vCPU on KVM, with 4 MiB of memory that is mapped as it is, and the hole for devices."""

    bus: Recorder
    block: MemoryBlock
    host: KvmHost
    vcpu: KvmVcpu
    memory: GuestMemory

    def put(self, code: str, at: int = CODE) -> None:
        data = bytes.fromhex(code)
        self.block.view[at : at + len(data)] = data

    def state(self) -> CpuState:
        state = CpuState(self.vcpu)
        self.vcpu.read(state)
        return state

    def word(self, at: int) -> int:
        return int.from_bytes(self.block.view[at : at + 8], "little")

    def until_halt(self) -> None:
        while self.vcpu.run() is not Exit.HALTED:
            pass


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def small(
    code: str = "", *, ring: int = 0, size: int = 4 << 20, apart: bool = False
) -> Iterator[Small]:
    """A machine about to execute *code*, in 64-bit mode; in ring 3 with access to all ports.

    With *apart* its vCPU has a mapping of the memory for itself.
    """
    bus = Recorder()
    with GuestMemory() as memory:
        block = memory.add("ram", size)
        host = KvmHost(bus)
        try:
            address = memory.map_for_vcpus(block) if apart else block.address
            host.map(0, address, block.size)
            machine = Small(bus, block, host, host.add_vcpu(), memory)
            _page_tables(block)
            machine.put(code)
            machine.vcpu.write(start(machine.state(), ring))
            yield machine
        finally:
            host.close()


def start(state: CpuState, ring: int) -> CpuState:
    """The state at :data:`CODE` in 64-bit mode."""
    state.rip, state.registers[RSP] = CODE, DATA
    state.rflags = 2 | (3 if ring else 0) << 12
    state.cs = Segment(8 | ring, 0, 0xFFFFFFFF, 0xA09B | ring << 5)
    state.ds = state.es = state.ss = Segment(16 | ring, 0, 0xFFFFFFFF, 0xC093 | ring << 5)
    state.fs = state.gs = state.ldtr = Segment()
    state.tr = Segment(0, 0, 0xFFFF, 0x8B)
    # CR4: OSXSAVE, OSXMMEXCPT, OSFXSR, PAE
    state.cr0, state.cr3, state.cr4, state.efer = 0x80010033, _TABLES, 0x40620, 0x500
    return state


def _page_tables(block: MemoryBlock) -> None:
    """The first and the fourth GiB as they are."""
    tables = block.array[_TABLES : _TABLES + 4 * 4096].view(np.uint64).reshape(4, 512)
    tables[0, 0] = _TABLES + 0x1000 | 7
    tables[1, 0] = _TABLES + 0x2000 | 7
    tables[1, 3] = _TABLES + 0x3000 | 7
    pages = np.arange(512, dtype=np.uint64) * np.uint64(_LARGE)
    tables[2] = pages | np.uint64(0xE7)
    tables[3] = pages + np.uint64(3 * _GIB) | np.uint64(0xE7)


class Running:
    """A vCPU in a thread of its own, until it is left; what ended it in ``error``."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu
        self._stop = False
        self.error: BaseException | None = None
        self.returns = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop:
                self._vcpu.run()
                self.returns += 1
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._vcpu.kick()
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
