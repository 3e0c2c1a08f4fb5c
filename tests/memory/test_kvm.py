"""What virtual CPUs of KVM write, and what the host writes meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from tests.machines.small import CODE, Running, Small, small
from tests.memory.logs import PAGE, Copy, Restless, collect, need_kvm, need_userfaultfd
from vmferry import UsageError
from vmferry.machines.cpu_state import CpuState
from vmferry.memory import DirtyLog, open_dirty_log

FIRST = (2 << 20) // PAGE
"""The first page that guests write."""

# mov edi, 2 MiB; mov ecx, 3; l: mov [rdi], ecx; add rdi, 8192; dec ecx; jnz l; hlt
THREE = "bf 00 00 20 00 b9 03 00 00 00 89 0f 48 81 c7 00 20 00 00 ff c9 75 f3 f4"
# The same from 8 MiB on, where there is no memory at first.
BEYOND = THREE.replace("20 00 b9", "80 00 b9")
# mov edi, 2 MiB; mov ecx, 3; l: mov eax, [rdi]; add rdi, 8192; dec ecx; jnz l; hlt
READ = THREE.replace("89 0f", "8b 07")
# mov edi, 2 MiB; l: inc dword [rdi]; xor dword [rdi+8], 1; add rdi, 4096; cmp edi, 4 MiB; jb l;
# jmp start
RESTLESS = """
    bf 00 00 20 00 ff 07 83 77 08 01 48 81 c7 00 10 00 00 81 ff 00 00 40 00 72 eb eb e4
"""

kinds = pytest.mark.parametrize("kind", ["userfaultfd", "kvm", "shadow"])
places = pytest.mark.parametrize("apart", [False, True], ids=["same mapping", "own mapping"])


@pytest.fixture(autouse=True)
def _needed() -> None:
    need_kvm()
    need_userfaultfd()


def started(machine: Small, kind: str) -> DirtyLog:
    log = open_dirty_log(machine.memory, kind, kvm=machine.host)
    log.start()
    return log


@kinds
@places
def test_pages_that_the_guest_wrote_and_no_others(kind: str, apart: bool) -> None:
    with small(THREE, apart=apart) as machine:
        log = started(machine, kind)
        machine.until_halt()
        # KVM's emulator marks pages of tables and code that it walks; so only those of the data.
        assert collect(log, machine.block) >= {FIRST, FIRST + 2, FIRST + 4}
        assert collect(log, machine.block) == set()
        machine.block.array[(FIRST + 9) * PAGE] = 1
        assert collect(log, machine.block) == {FIRST + 9}
        log.stop()


@kinds
@places
def test_pages_that_the_guest_read_are_not_reported(kind: str, apart: bool) -> None:
    with small(READ, apart=apart) as machine:
        machine.block.array[FIRST * PAGE :] = 1
        log = started(machine, kind)
        machine.until_halt()
        assert not collect(log, machine.block) & {FIRST, FIRST + 2, FIRST + 4}
        log.stop()


@kinds
@places
def test_a_guest_and_a_host_that_never_rest_lose_nothing(kind: str, apart: bool) -> None:
    with small(RESTLESS, ring=3, apart=apart) as machine:
        block = machine.block
        by_host = block.array.view(np.uint32).reshape(-1, PAGE // 4)[FIRST::3, 500]
        by_guest = block.array.view(np.uint32).reshape(-1, PAGE // 4)[FIRST:, 0]

        def write() -> None:
            np.add(by_host, np.uint32(1), out=by_host)

        log = started(machine, kind)
        with Restless(write) as restless:
            with Running(machine.vcpu) as running:
                copy = Copy(log, block)
                while restless.turns[0] < 300 or int(by_guest.min()) < 30:
                    copy.send()
            assert running.error is None
        copy.check()
        log.stop()


@kinds
def test_memory_that_the_guest_gets_later_is_logged(kind: str) -> None:
    with small(BEYOND) as machine:
        log = started(machine, kind)
        block = machine.memory.add("more", 16 * PAGE)
        machine.host.map(8 << 20, machine.memory.map_for_vcpus(block), block.size)
        machine.until_halt()
        assert collect(log, block) == {0, 2, 4}
        assert collect(log, block) == set()
        machine.vcpu.write(_again(machine))
        machine.until_halt()
        expected = set() if kind == "shadow" else {0, 2, 4}
        assert collect(log, block) == expected
        log.stop()


def test_pages_written_between_the_making_of_a_slot_and_the_next_look_are_reported() -> None:
    with small(BEYOND) as machine:
        log = started(machine, "kvm")
        block = machine.memory.add("more", 16 * PAGE)
        block.array[: 8 * PAGE] = 1
        assert collect(log, block) == set(range(8))
        machine.host.map(8 << 20, machine.memory.map_for_vcpus(block), block.size)
        machine.until_halt()
        assert collect(log, block) >= {0, 2, 4}
        assert collect(log, block) == set()
        log.stop()


def _again(machine: Small) -> CpuState:
    state = machine.state()
    state.rip = CODE
    return state


def test_a_block_of_several_slots_is_logged_in_one_bitmap() -> None:
    with small(BEYOND) as machine:
        block = machine.memory.add("more", 100 * PAGE)
        address = machine.memory.map_for_vcpus(block)
        machine.host.map(8 << 20, address + 37 * PAGE, 3 * PAGE)
        machine.host.map((8 << 20) + 3 * PAGE, address + 90 * PAGE, 2 * PAGE)
        machine.host.map((8 << 20) + 5 * PAGE, address, PAGE)
        log = started(machine, "kvm")
        machine.until_halt()
        assert collect(log, block) == {37, 39, 91}
        log.stop()


def test_kvm_logs_no_more_than_it_has_to() -> None:
    with small() as machine:
        rom = machine.memory.add("rom", PAGE, read_only=True)
        machine.host.map(8 << 20, rom.address, PAGE, read_only=True)
        slots = machine.host.slots
        log = started(machine, "kvm")
        machine.host.collect(slots[0])
        with pytest.raises(UsageError, match="slot 1 is not logged"):
            machine.host.collect(slots[1])
        log.stop()
        with pytest.raises(UsageError, match="slot 0 is not logged"):
            machine.host.collect(slots[0])
