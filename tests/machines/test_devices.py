"""The devices at their registers, and that each goes on where its state was loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmferry
from vmferry import Registry
from vmferry.errors import StreamError, UsageError
from vmferry.machines.addresses import TIMER_STRIDE
from vmferry.machines.bus import DeviceBus
from vmferry.machines.devices.clock import RealTimeClock
from vmferry.machines.devices.debug_exit import DebugExit
from vmferry.machines.devices.serial import Serial
from vmferry.machines.devices.timer import IntervalTimer, RestPorts


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: int = 1_000) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


@dataclass
class Board:
    """A machine of one device."""

    device: object
    name: str = "board-1.0"
    registry: Registry = field(default_factory=Registry)

    def __post_init__(self) -> None:
        self.registry.register(self.device)


def move(source: object, target: object, directory: Path) -> None:
    """The state of a device into another, by a file."""
    vmferry.save(Board(source), directory / "state")
    vmferry.load(Board(target), directory / "state")


# The interval timer


def timer(clock: Clock, count: int = 2) -> IntervalTimer:
    made = IntervalTimer(count, lambda _: None)
    made.clock = clock
    return made


def test_guest_time_is_that_of_running_only(tmp_path: Path) -> None:
    clock = Clock()
    first = timer(clock)
    assert first.now() == 0
    first.start()
    clock.now += 50
    first.start()
    clock.now += 50
    assert first.now() == 100
    first.stop()
    clock.now += 1_000_000
    first.stop()
    assert first.now() == 100
    second = timer(Clock(7))
    move(first, second, tmp_path)
    assert second.now() == 100
    second.start()
    assert isinstance(second.clock, Clock)
    second.clock.now += 5
    assert second.now() == 105


def test_alarms_are_of_guest_time_and_move(tmp_path: Path) -> None:
    clock = Clock()
    first = timer(clock)
    assert first.until_alarm(0) is None
    first.write(TIMER_STRIDE + 8, 8, 3_000_000_000)
    assert first.until_alarm(0) is None
    assert first.until_alarm(1) == 3.0
    second = timer(Clock(7))
    move(first, second, tmp_path)
    second.start()
    assert second.until_alarm(1) == 3.0
    assert isinstance(second.clock, Clock)
    second.clock.now += 4_000_000_000
    assert second.until_alarm(1) == 0
    second.write(TIMER_STRIDE + 8, 8, 0)
    assert second.until_alarm(1) is None


def test_counter_read_in_halves_is_of_one_instant(tmp_path: Path) -> None:
    clock = Clock(0)
    first = timer(clock)
    first.start()
    clock.now = (5 << 32) - 1
    assert first.read(0, 4) == 0xFFFFFFFF
    clock.now += 1
    assert first.read(TIMER_STRIDE, 4) == 0  # of another vCPU, between the halves
    first.stop()
    second = timer(Clock(0))
    move(first, second, tmp_path)
    assert second.read(4, 4) == 4
    assert second.read(TIMER_STRIDE + 4, 4) == 5
    assert second.read(0, 8) == 5 << 32


@given(
    start=st.integers(0, (1 << 64) - 1),
    writes=st.lists(
        st.tuples(st.sampled_from([(8, 8), (8, 4), (12, 4)]), st.integers(0, (1 << 64) - 1))
    ),
)
def test_alarm_is_what_was_written_last_to_each_half(
    start: int, writes: list[tuple[tuple[int, int], int]]
) -> None:
    device = timer(Clock(), 1)
    device.write(8, 8, start)
    expected = bytearray(start.to_bytes(8, "little"))
    for (offset, size), number in writes:
        value = number & (1 << 8 * size) - 1
        device.write(offset, size, value)
        expected[offset - 8 : offset - 8 + size] = value.to_bytes(size, "little")
    for offset, size in ((8, 8), (8, 4), (12, 4), (9, 1)):
        found = device.read(offset, size)
        assert found == int.from_bytes(expected[offset - 8 : offset - 8 + size], "little")


def test_ports_let_their_vcpus_rest() -> None:
    resting: list[int] = []
    ports = RestPorts(IntervalTimer(3, resting.append))
    ports.write(2, 1, 0)
    ports.write(0, 4, 99)
    assert resting == [2, 0]
    assert ports.read(1, 1) == 0


def test_counter_is_not_written() -> None:
    device = timer(Clock())
    device.write(0, 8, 77)
    assert device.read(0, 8) == 0


def test_timer_of_another_number_of_vcpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=r"interval-timer\.count: expected 3"):
        move(timer(Clock()), timer(Clock(), 3), tmp_path)


# The serial port


def port() -> tuple[Serial, list[bytes]]:
    sent: list[bytes] = []
    return Serial(sent.append), sent


def test_serial_port_goes_on_with_its_registers_and_input(tmp_path: Path) -> None:
    first, sent = port()
    first.receive(b"abc")
    assert first.read(0, 1) == ord("a")
    first.write(3, 1, 0x83)
    first.write(0, 1, 0x0C)
    first.write(1, 1, 0x01)
    first.write(3, 1, 0x03)
    first.write(1, 1, 0x05)
    first.write(4, 1, 0x0B)
    first.write(7, 1, 0x5A)
    second, others = port()
    move(first, second, tmp_path)
    assert [second.read(register, 1) for register in (1, 3, 4, 7)] == [5, 3, 0x0B, 0x5A]
    assert second.divisor == 0x10C
    assert second.read(5, 1) == 0x61
    assert [second.read(0, 1) for _ in range(3)] == [ord("b"), ord("c"), 0]
    assert second.read(5, 1) == 0x60
    second.receive(b"d")
    assert second.read(0, 1) == ord("d")
    for byte in b"hi":
        second.write(0, 1, byte)
    assert (sent, others) == ([], [b"h", b"i"])


def test_divisor_hides_data_and_interrupts() -> None:
    device, sent = port()
    device.write(3, 1, 0x80)
    device.write(0, 1, 0x41)
    device.write(1, 1, 0x02)
    assert (device.read(0, 1), device.read(1, 1), sent) == (0x41, 0x02, [])
    device.write(3, 1, 0)
    assert device.read(1, 1) == 0


def test_registers_that_a_driver_probes() -> None:
    device, _ = port()
    device.write(2, 1, 0xC1)
    assert device.read(2, 1) == 0xC1
    assert device.read(6, 1) == 0xB0
    device.write(6, 1, 0xFF)
    assert device.read(6, 1) == 0xB0


def test_input_that_nobody_reads_has_an_end() -> None:
    device, _ = port()
    device.receive(bytes(4096))
    with pytest.raises(UsageError, match="the guest has 4096 bytes to read"):
        device.receive(b"x")


# The others


def test_times_that_were_taken_stay_and_move(tmp_path: Path) -> None:
    first = RealTimeClock(Clock(0x0102030405060708), clock=Clock(0x1122334455667788))
    first.write(0, 1, 0)
    second = RealTimeClock(Clock(6), clock=Clock(5))
    move(first, second, tmp_path)
    halves = [second.read(offset, 4) for offset in (0, 4, 8, 12)]
    assert halves == [0x55667788, 0x11223344, 0x05060708, 0x01020304]
    second.write(0, 1, 0)
    assert [second.read(offset, 4) for offset in (0, 4, 8, 12)] == [5, 0, 6, 0]


def test_clocks_with_something_in_between_are_read_again() -> None:
    wall = Clock(100)

    def delayed() -> int:
        guest = wall.now
        wall.now += delays.pop()
        return guest

    delays = [0, 1_000_000, 30_000]
    clock = RealTimeClock(delayed, clock=wall)
    clock.write(0, 1, 0)
    assert clock.wall == clock.guest == 1_030_100
    assert delays == []


def test_first_exit_status_counts_and_moves(tmp_path: Path) -> None:
    ended: list[str] = []
    first = DebugExit(lambda: ended.append("first"))
    assert first.read(0, 1) == 0
    first.write(0, 1, 7)
    first.write(0, 1, 8)
    second = DebugExit(lambda: ended.append("second"))
    move(first, second, tmp_path)
    assert (second.over, second.status) == (True, 7)
    assert ended == ["first"]


class Recorder:
    """A device that tells what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.asked.append((offset, size))
        return 1

    def write(self, offset: int, size: int, value: int) -> None:
        self.asked.append((offset, size, value))


def test_bus_asks_the_device_that_is_there() -> None:
    low, high = Recorder(), Recorder()
    bus = DeviceBus(ports=[(range(8), low)], memory=[(range(0x1000, 0x1010), high)])
    assert bus.port_read(7, 1) == 1
    bus.port_write(0, 4, 99)
    assert bus.memory_read(0x1008, 8) == 1
    bus.memory_write(0x100F, 1, 5)
    assert low.asked == [(7, 1), (0, 4, 99)]
    assert high.asked == [(8, 8), (15, 1, 5)]


def test_where_no_device_is_all_bits_are_set() -> None:
    bus = DeviceBus()
    assert [bus.port_read(1, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert bus.memory_read(0, 8) == (1 << 64) - 1
    bus.port_write(1, 1, 0)
    bus.memory_write(1, 1, 0)
