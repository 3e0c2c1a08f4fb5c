"""A hosted machine as its users see it: it runs, stands still, is saved, and goes on elsewhere."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

import vmferry
from tests.machines.hosted import KINDS, MIB, PAGE, Start, config, move
from vmferry.errors import MachineError, StreamError, UsageError
from vmferry.machines import create
from vmferry.machines.guest.layout import OFFSETS
from vmferry.machines.long_mode import enter

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("cpus", [1, 3])
def test_guest_finds_nothing_wrong_over_many_walks_and_pauses(
    hosted: Start, kind: str, cpus: int
) -> None:
    guest = hosted(kind, cpus=cpus, hot=0.7, changed=0.3).run_until_filled()
    for _ in range(30):
        guest.console.wait_beat()
        assert guest.findings() == []
        guest.machine.resume()
    guest.run_on()
    assert guest.findings() == []
    assert guest.console.reports == []
    assert guest.machine.wait(0) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"hot": 0.0},
        {"hot": 1.0},
        {"changed": 0.001},
        {"working_set": 4096},
        {"working_set": 3 * 4096, "cpus": 4},
        {"ram": MIB, "working_set": None},
    ],
)
def test_every_kind_of_walk_is_right(hosted: Start, kind: str, settings: dict[str, object]) -> None:
    guest = hosted(kind, **settings).run_until_filled()
    guest.run_on()
    assert guest.findings() == []


def test_paused_machine_changes_nothing(hosted: Start, kind: str) -> None:
    guest = hosted(kind, cpus=2).run_until_filled()
    guest.machine.pause()
    guest.machine.pause()
    assert not guest.machine.running
    before, count = guest.ram.copy(), guest.console.count
    time.sleep(0.05)
    assert np.array_equal(guest.ram, before)
    assert guest.console.count == count
    guest.machine.resume()
    guest.machine.resume()
    assert guest.machine.running
    guest.console.wait_beat()


def test_pauses_at_any_moment_tear_nothing(hosted: Start, kind: str) -> None:
    guest = hosted(kind, cpus=2, hot=0.5, changed=0.5).run_until_filled()
    for _ in range(1000):
        guest.machine.pause()
        guest.machine.resume()
    guest.run_on()
    assert guest.findings() == []


def test_guest_time_stands_still_while_the_machine_is_paused(hosted: Start, kind: str) -> None:
    guest = hosted(kind).run_until_filled()
    guest.machine.pause()
    before = guest.console.beats[-1]
    time.sleep(0.2)
    guest.machine.resume()
    stood = guest.fresh_beat().stood_still(before)
    assert stood >= 190_000_000


def test_rate_is_held_by_guest_time(hosted: Start, kind: str) -> None:
    guest = hosted(kind, rate=1000, cpus=2, working_set=64 * 4096).run_until_filled()
    first = guest.console.wait_beat()
    while (last := guest.console.wait_beat()).time < first.time + 1_000_000_000:
        pass
    pages = (last.time - first.time) * 1000 // 1_000_000_000
    # What was due between a page and its heartbeat, and what a late vCPU may catch up with.
    assert last.hot - first.hot <= pages * 1.02 + 2 * 50


def test_throttled_guest_goes_on_and_is_right(hosted: Start, kind: str) -> None:
    guest = hosted(kind, cpus=2).run_until_filled()
    for percent in (99, 20, 0, 50, 0):
        guest.machine.throttle(percent)
        guest.console.wait_beat()
        guest.machine.pause()
        guest.machine.resume()
    guest.run_on()
    assert guest.findings() == []
    with pytest.raises(UsageError, match="0 to 99 percent, not 100"):
        guest.machine.throttle(100)


@pytest.mark.parametrize("other_kind", KINDS)
def test_machine_goes_on_in_another(
    hosted: Start, kind: str, other_kind: str, tmp_path: Path
) -> None:
    guest = hosted(kind, cpus=2, hot=0.7, changed=0.3).run_until_filled()
    for turn in range(5):
        guest.machine.resume()
        guest.console.wait_beat()
        other = hosted((other_kind, kind)[turn % 2], cpus=2, hot=0.7, changed=0.3)
        move(guest, other, tmp_path)
        before = guest.console.beats[-1]
        other.machine.resume()
        after = other.fresh_beat()
        assert after.time > before.time
        assert after.hot >= before.hot
        assert after.stood_still(before) > 0
        other.run_on()
        assert other.findings() == []
        guest = other


def test_dirty_log_has_every_page_that_changed(hosted: Start, kind: str) -> None:
    guest = hosted(kind, cpus=2, hot=0.3).run_until_filled()
    log = guest.machine.dirty_log()
    log.start()
    block = guest.machine.memory["ram"]
    bits = np.zeros(-(-block.pages // 64), np.uint64)
    try:
        for _ in range(10):
            guest.machine.pause()
            log.collect(block, bits)
            before = guest.ram.copy()
            bits[:] = 0
            guest.machine.resume()
            guest.console.wait_beat()
            log.collect(block, bits)
            guest.machine.pause()
            guest.ram[-1] ^= 1  # written by the host, and not by a vCPU
            log.collect(block, bits)
            changed = (guest.ram != before).reshape(-1, PAGE).any(axis=1)
            logged = np.unpackbits(bits.view(np.uint8), bitorder="little")[: block.pages]
            assert changed[-1]
            assert changed.sum() > 1
            assert not (changed & ~logged.astype(bool)).any()
            guest.machine.resume()
    finally:
        log.stop()


def test_resting_vcpu_wakes_in_another_machine(hosted: Start, kind: str, tmp_path: Path) -> None:
    guest = hosted(kind, rate=5, working_set=4 * 4096, heartbeat=0.001).run_until_filled()
    guest.console.wait_beat()
    other = hosted(kind, rate=5, working_set=4 * 4096, heartbeat=0.001)
    move(guest, other, tmp_path)
    other.machine.resume()
    other.console.wait_beat()
    assert other.findings() == []


def test_machine_with_other_vcpus_is_refused(hosted: Start, kind: str, tmp_path: Path) -> None:
    one, two = hosted(kind), hosted(kind, cpus=2)
    vmferry.save(one.machine, tmp_path / "state")
    with pytest.raises(StreamError, match="expected 2, as this device has, found 1"):
        vmferry.load(two.machine, tmp_path / "state")


def test_status_of_a_guest_that_ends_is_heard_and_stays(
    hosted: Start, kind: str, tmp_path: Path
) -> None:
    guest = hosted(kind).run_until_filled()
    guest.machine.pause()
    guest.page(7)[100] ^= 1
    assert guest.machine.wait(0) is None
    guest.machine.resume()
    assert guest.machine.wait(60) == 1
    assert not guest.machine.running
    guest.machine.resume()
    assert not guest.machine.running
    other = hosted(kind)
    move(guest, other, tmp_path)
    other.machine.resume()
    assert other.machine.wait(0) == 1


def test_error_of_a_device_ends_the_machine_and_is_raised(kind: str) -> None:
    def broken(_: bytes) -> None:
        raise ValueError("no paper")

    with create(config(kind), serial=broken) as machine:
        machine.start()
        with pytest.raises(MachineError, match="the machine stopped: no paper"):
            machine.wait(60)
        assert not machine.running


def test_guest_without_code_ends_the_machine(hosted: Start, kind: str) -> None:
    guest = hosted(kind).run_until_filled()
    guest.machine.pause()
    cpu = guest.cpu()
    cpu.rip = 5 << 30  # where its page tables map nothing
    cpu.post_load(1)
    guest.machine.resume()
    with pytest.raises(MachineError, match="the machine stopped"):
        guest.machine.wait(60)


def test_registers_come_back_as_they_were(hosted: Start, kind: str) -> None:
    guest = hosted(kind).run_until_filled()
    guest.machine.pause()
    cpu = guest.cpu()
    cpu.registers = [(number + 1) * 0x0123_4567_89AB_CDEF % (1 << 64) for number in range(16)]
    cpu.rflags = 0xCD7
    cpu.fs.base, cpu.gs.base = 0x1234_5678_9ABC, 0xFFFF_8000_0000_0010
    cpu.fpu.control, cpu.fpu.status, cpu.fpu.tags = 0x27F, 0x2900, 0b01101001
    cpu.fpu.mxcsr = 0x1F85
    cpu.fpu.xmm = bytes(range(256))
    cpu.fpu.registers = b"".join(
        bytes([number, *range(6), 0x80, number, 0x40]) + bytes(6) for number in range(8)
    )
    cpu.msrs.lstar, cpu.msrs.star = 0xFFFF_FFFF_8000_0000, 0x0010_0008 << 32
    cpu.msrs.kernel_gs_base, cpu.msrs.sfmask = 0x7FFF_1234_0000, 0x700
    cpu.post_load(1)
    wanted = _fields(cpu)
    cpu.registers = [0] * 16
    cpu.fpu.xmm = bytes(256)
    cpu.pre_save()
    assert _fields(cpu) == wanted


def _fields(cpu: object) -> dict[str, object]:
    names = ("registers", "rip", "rflags", "cs", "ds", "fs", "gs", "tr", "gdt", "cr0", "cr3", "cr4")
    fpu = cpu.fpu  # type: ignore[attr-defined]
    msrs = cpu.msrs  # type: ignore[attr-defined]
    taken = {name: getattr(cpu, name) for name in names}
    taken |= {name: getattr(fpu, name) for name in ("control", "status", "tags", "mxcsr", "xmm")}
    taken |= {name: getattr(msrs, name) for name in ("lstar", "star", "kernel_gs_base", "sfmask")}
    taken["st"] = fpu.registers
    return taken


def test_ram_above_the_hole_is_one_piece_for_the_guest(hosted: Start, kind: str) -> None:
    guest = hosted(kind, ram=3072 * MIB + 2 * MIB, working_set=16 * PAGE).run_until_filled()
    guest.machine.pause()
    # It begins again, in other pages: half of them below the hole, half above.
    moved = 3072 * MIB - 8 * PAGE
    counters = guest.counters()
    counters[OFFSETS["base"] // 8] = moved
    counters[OFFSETS["hot_steps"] // 8] = 0
    counters[OFFSETS["cold_steps"] // 8] = 0
    cpu = guest.cpu()
    enter(cpu, guest.machine.layout, 0)
    cpu.post_load(1)
    guest.machine.resume()
    guest.run_on()
    guest.machine.pause()
    assert int(guest.ram[moved + 15 * PAGE :].view("<u8")[1]) == 15
    assert not guest.ram[moved + 16 * PAGE :].any()


def test_output_is_whole_when_several_vcpus_run(hosted: Start, kind: str) -> None:
    guest = hosted(kind, cpus=4)
    lines: list[bytes] = []
    feed = guest.console.feed
    guest.machine.serial.output = lambda data: (lines.append(data), feed(data))[1]
    guest.run_until_filled()
    for _ in range(20):
        guest.console.wait_beat()
    guest.machine.pause()
    whole = b"".join(lines).split(b"\n")[:-1]
    assert len(whole) == guest.console.count


def test_nothing_is_left_of_a_closed_machine(kind: str) -> None:
    before = set(threading.enumerate())
    with create(config(kind, cpus=2), serial=lambda _: None) as machine:
        machine.start()
        machine.throttle(50)
    machine.close()
    assert set(threading.enumerate()) <= before
