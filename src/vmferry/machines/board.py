"""The machine: RAM, vCPUs on some host, devices with declared state, and a guest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self
from uuid import UUID

from vmferry.errors import MachineError
from vmferry.images import Image
from vmferry.memory import DirtyLog, GuestMemory, open_dirty_log
from vmferry.migration.registry import Registry

from .addresses import (
    CLOCK_PORT,
    DISK,
    DISK_STRIDE,
    EXIT_PORT,
    HOLE_END,
    HOLE_START,
    REST_PORT,
    SERIAL_PORT,
    TIMER,
    TIMER_STRIDE,
)
from .bus import DeviceBus
from .config import MachineConfig
from .cpu import Bus, CpuHost
from .cpu_state import CpuState
from .devices.clock import RealTimeClock
from .devices.debug_exit import DebugExit
from .devices.disk import SECTOR, Disk, IoError
from .devices.serial import Serial
from .devices.timer import IntervalTimer, RestPorts
from .guest.layout import Layout
from .guest.program import install
from .long_mode import enter
from .runner import Runner

NAME: Final = "vmferry-1.0"
RAM: Final = "ram"

_JOURNAL: Final = 1 << 16
"""Sectors of the journal at the most."""


class HostedMachine:
    """A machine that this process runs; a context manager, closed at the end.

    Made at rest, with empty memory: :meth:`start` runs a fresh guest, or its state is loaded and
    :meth:`resume` goes on with it.  What *serial* is called with is what the guest sends; it is
    called in the thread of a vCPU, and must neither wait nor call the machine.  Its disks are on
    *images*, which belong to it: they are closed with it.  *io_error* is as in
    :func:`~vmferry.machines.create`.
    """

    name: Final = NAME

    def __init__(
        self,
        config: MachineConfig,
        make_host: Callable[[Bus], CpuHost],
        *,
        serial: Callable[[bytes], None],
        io_error: Callable[[IoError], None] | None = None,
        images: Sequence[Image] = (),
    ) -> None:
        self.config = config
        self.images: Final = tuple(images)
        """The images of its disks; active before it runs."""
        self._io_error = io_error or self._stop_for_disk
        self.layout: Final = Layout.of(config)
        self.uuid: UUID | None = config.uuid
        self.registry = Registry()
        self.running = False
        self.serial = Serial(serial)
        self._timer = IntervalTimer(config.cpus, self._rest)
        self._exit = DebugExit(self._guest_ended)
        self._over = threading.Event()
        self._lock = threading.Lock()  # of `running` and what goes with it
        self._stopping = False
        with ExitStack() as stack:
            for image in images:
                stack.callback(image.close)
            self.memory = stack.enter_context(GuestMemory())
            self.disks: Final = tuple(self._disk(number) for number in range(len(images)))
            for disk in self.disks:
                stack.callback(disk.close)
            host = make_host(self._bus())
            stack.callback(host.close)
            self._slots = host.dirty_slots()
            self._map_ram(host)
            vcpus = [host.add_vcpu() for _ in range(config.cpus)]
            self._runner = Runner(
                vcpus, until_alarm=self._timer.until_alarm, ended=self._machine_ended
            )
            stack.callback(self._runner.close)
            self._cleanup = stack.pop_all()
        self._cpus = [CpuState(vcpu) for vcpu in vcpus]
        for cpu in self._cpus:
            self.registry.register(cpu)

    def _bus(self) -> DeviceBus:
        clock = RealTimeClock(self._timer.now)
        for device in (self._timer, self.serial, clock, self._exit, *self.disks):
            self.registry.register(device)
        timers = TIMER + TIMER_STRIDE * self.config.cpus
        return DeviceBus(
            ports=[
                (range(SERIAL_PORT, SERIAL_PORT + 8), self.serial),
                (range(CLOCK_PORT, CLOCK_PORT + 16), clock),
                (range(EXIT_PORT, EXIT_PORT + 1), self._exit),
                (range(REST_PORT, REST_PORT + self.config.cpus), RestPorts(self._timer)),
            ],
            memory=[
                (range(TIMER, timers), self._timer),
                *(
                    (range(place := DISK + n * DISK_STRIDE, place + DISK_STRIDE), disk)
                    for n, disk in enumerate(self.disks)
                ),
            ],
        )

    def _disk(self, number: int) -> Disk:
        image, wanted = self.images[number], self.config.disk[number]
        disk = Disk(image, self, self._io_error, image.size, int(image.read_only), number)
        disk.werror, disk.rerror = wanted.werror, wanted.rerror
        return disk

    def _stop_for_disk(self, error: IoError) -> None:
        if error.stops():
            # This is the thread of the disk, for which a pause waits.
            threading.Thread(target=self.pause, name="stop for a disk", daemon=True).start()

    def at(self, address: int, length: int) -> memoryview | None:
        """See :class:`~.devices.disk.Ram`."""
        block = self.memory[RAM]
        low = min(block.size, HOLE_START)
        start = address
        if address + length > low:
            start = address - HOLE_END + low
            if address < HOLE_END or start + length > block.size:
                return None
        block.fetch(start, length)
        return block.view[start : start + length]

    def _rest(self, index: int) -> None:
        self._runner.rest(index)

    def _map_ram(self, host: CpuHost) -> None:
        file = self.config.memory_file
        block = self.memory.add(RAM, self.config.ram, shared=file is not None, file=file)
        if self.config.preallocate:
            block.preallocate()
        low = min(block.size, HOLE_START)
        address = block.address
        if self._slots is not None:
            address = self.memory.map_for_vcpus(block)
        host.map(0, address, low)
        if block.size > low:
            host.map(HOLE_END, address + low, block.size - low)

    # Running

    def start(self) -> None:
        """Put the guest into memory and run it from its first instruction."""
        block, ram = self.memory[RAM], self.memory[RAM].array
        if self.config.memory_file is not None:
            block.check_alone()
            block.discard(0, block.size)  # what another machine has left there
        sectors = min(self.images[0].size // SECTOR, _JOURNAL) if self.images else 0
        install(ram, self.config, journal_sectors=sectors)
        for index, cpu in enumerate(self._cpus):
            enter(cpu, self.layout, index)
            cpu.holder.write(cpu)
        self.resume()

    def resume(self) -> None:
        """Run, if it does not; a guest that has ended stays where it is."""
        with self._lock:
            if self._exit.over:
                self._over.set()
            if (self.running and not self._stopping) or self._over.is_set():
                return
            for disk in self.disks:
                disk.check()
            if not self.running:
                self._timer.start()
            self._stopping = False
            for disk in self.disks:
                disk.start()
            self._runner.resume()
            self.running = True

    @property
    def vcpu_threads(self) -> list[int]:
        """The kernel's ids of the threads of the vCPUs."""
        return self._runner.threads

    def pause(self) -> None:
        """Stop all vCPUs and guest time; when this returns nothing changes any more.

        That takes as long as the storage of the disks needs for what was begun.  :meth:`resume`
        ends the wait, with :class:`MachineError`.
        """
        with self._lock:
            self._runner.pause()
            for disk in self.disks:
                disk.stop()
            self._stopping = self.running
        for disk in self.disks:
            disk.drain()
        with self._lock:
            if self.running and not self._stopping:
                raise MachineError("the machine was let run again before it stood still")
            self._timer.stop()
            self.running = self._stopping = False

    def throttle(self, percent: int) -> None:
        """Keep the vCPUs from running for *percent* of the time, 0 to 99."""
        self._runner.throttle(percent)

    def dirty_log(self) -> DirtyLog:
        """A log of the pages that guest and host write."""
        return open_dirty_log(self.memory, kvm=self._slots)

    # The end

    def wait(self, timeout: float | None = None) -> int | None:
        """The exit status of the guest once it has ended; ``None`` if it has not by then.

        Raises :class:`MachineError` where it could not go on.
        """
        if not self._over.wait(timeout):
            return None
        if (failure := self._runner.failure) is not None:
            raise MachineError(f"the machine stopped: {failure}") from failure
        return self._exit.status

    def _guest_ended(self) -> None:
        self._runner.end()
        self._machine_ended()

    def _machine_ended(self) -> None:
        self.running = False
        self._over.set()

    def close(self) -> None:
        """End the threads and give everything back."""
        self._cleanup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
