"""vCPUs of KVM that execute a few instructions each."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from vmferry.errors import MachineError, UsageError
from vmferry.machines.cpu import Exit
from vmferry.machines.cpu_state import RAX, RCX
from vmferry.machines.kvm import CpuFailure, KvmHost, abi
from vmferry.machines.kvm.system import Kvm

from .hosted import NO_KVM
from .small import CODE, DATA, DEVICE, Recorder, Running, small, wait_until

FOREVER = "eb fe"  # jmp to itself
Access = tuple[str, int, int, int]


pytestmark = pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM)


# Exits


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize(
    ("code", "access"),
    [
        ("b0 41 e6 80", ("out", 0x80, 1, 0x41)),
        ("66 b8 34 12 66 ba 34 12 66 ef", ("out", 0x1234, 2, 0x1234)),
        ("b8 78 56 34 12 66 ba f8 03 ef", ("out", 0x3F8, 4, 0x12345678)),
        ("b0 42 a2 00 00 c0 fe 00 00 00 00", ("store", DEVICE, 1, 0x42)),
        ("b8 78 56 34 12 a3 04 00 c0 fe 00 00 00 00", ("store", DEVICE + 4, 4, 0x12345678)),
        ("48 b8 f0 de bc 9a 78 56 34 12 48 a3 08 00 c0 fe 00 00 00 00",
         ("store", DEVICE + 8, 8, 0x123456789ABCDEF0)),
    ],
)  # fmt: skip
def test_what_the_guest_writes_reaches_the_bus(code: str, access: Access, ring: int) -> None:
    with small(code + FOREVER, ring=ring) as machine:
        machine.bus.noticed = machine.vcpu.kick
        assert machine.vcpu.run() is Exit.KICKED
        assert machine.bus.accesses == [access]
        assert machine.state().rip == CODE + len(bytes.fromhex(code))


@pytest.mark.parametrize("ring", [0, 3])
@pytest.mark.parametrize(
    ("code", "access"),
    [
        ("48 c7 c0 ff ff ff ff e4 60", ("in", 0x60, 1)),
        ("48 c7 c0 ff ff ff ff 66 ba f8 03 66 ed", ("in", 0x3F8, 2)),
        ("a0 00 00 c0 fe 00 00 00 00", ("load", DEVICE, 1)),
        ("48 a1 10 00 c0 fe 00 00 00 00", ("load", DEVICE + 16, 8)),
    ],
)
def test_what_the_bus_answers_reaches_the_guest(
    code: str, access: tuple[str, int, int], ring: int
) -> None:
    value = 0x1122334455667788 & (1 << 8 * access[2]) - 1
    with small(code + FOREVER, ring=ring) as machine:
        machine.bus.noticed = machine.vcpu.kick
        machine.bus.answer = lambda _address, _size: value
        assert machine.vcpu.run() is Exit.KICKED
        assert machine.bus.accesses == [(*access, value)]
        state = machine.state()
        # The access is complete, though the kick came in the middle of it.
        assert state.registers[RAX] & (1 << 8 * access[2]) - 1 == value
        assert state.rip == CODE + len(bytes.fromhex(code))


@pytest.mark.parametrize("ring", [0, 3])
def test_a_string_instruction_is_one_access_after_the_other(ring: int) -> None:
    # mov ecx, 5; mov dx, 0x3f8; mov esi, DATA; rep outsb; out 0x80, al
    code = "b9 05 00 00 00 66 ba f8 03 be 00 00 02 00 f3 6e e6 80" + FOREVER
    with small(code, ring=ring) as machine:
        machine.put(b"hello".hex(), DATA)
        with Running(machine.vcpu):
            wait_until(lambda: ("out", 0x80, 1, 0) in machine.bus.accesses)
        written = [value for what, port, *_, value in machine.bus.accesses if port == 0x3F8]
        assert bytes(written) == b"hello"
        assert machine.state().registers[RCX] == 0


def test_a_string_instruction_reads_one_after_the_other() -> None:
    # mov ecx, 3; mov dx, 0x3f8; mov edi, DATA; rep insw; hlt
    with small("b9 03 00 00 00 66 ba f8 03 bf 00 00 02 00 66 f3 6d f4") as machine:
        numbers = iter([0x1111, 0x2222, 0x3333, 0x4444])
        machine.bus.answer = lambda _port, _size: next(numbers)
        machine.until_halt()
        assert machine.word(DATA) == 0x3333_2222_1111


def test_an_access_across_the_end_of_memory_is_split() -> None:
    # mov rax, 0x1122334455667788; mov [0x3ffffc], rax; hlt; memory ends at 4 MiB
    with small("48 b8 88 77 66 55 44 33 22 11 48 a3 fc ff 3f 00 00 00 00 00 f4") as machine:
        machine.until_halt()
        assert machine.word((4 << 20) - 8) == 0x55667788_00000000
        stored = [(address, size) for _, address, size, _ in machine.bus.accesses]
        assert sum(size for _, size in stored) == 4
        assert stored[0][0] == 4 << 20


def test_hlt_returns_and_the_guest_goes_on_behind_it() -> None:
    with small("f4 b0 01 e6 80 f4") as machine:
        assert machine.vcpu.run() is Exit.HALTED
        assert machine.bus.accesses == []
        assert machine.vcpu.run() is Exit.HALTED
        assert machine.bus.accesses == [("out", 0x80, 1, 1)]


def test_an_error_of_the_bus_comes_out_and_leaves_no_access_half_done() -> None:
    # in al, 0x60; out 0x80, al; hlt
    with small("e4 60 e6 80 f4") as machine:

        def fail(_port: int, _size: int) -> int:
            raise OSError("no such device")

        machine.bus.answer = fail
        with pytest.raises(OSError, match="no such device"):
            machine.vcpu.run()
        state = machine.state()
        assert (state.rip, state.registers[RAX]) == (CODE + 2, 0xFF)
        machine.until_halt()
        assert machine.bus.accesses == [("out", 0x80, 1, 0xFF)]


# Memory


def test_the_guest_writes_memory() -> None:
    # mov edi, DATA; mov ecx, 512; l: mov [rdi], rcx; add rdi, 8; dec ecx; jnz l; hlt
    with small("bf 00 00 02 00 b9 00 02 00 00 48 89 0f 48 83 c7 08 ff c9 75 f5 f4") as machine:
        machine.until_halt()
        words = machine.block.array[DATA : DATA + 4096].view(np.uint64)
        assert list(words) == list(range(512, 0, -1))


def test_memory_may_be_added_while_the_guest_runs() -> None:
    # l: mov rax, [8 MiB]; cmp rax, -1; je l; out 0x80, al; jmp to itself; no memory is all ones
    code = "48 a1 00 00 80 00 00 00 00 00 48 83 f8 ff 74 f0 e6 80" + FOREVER
    with small(code, ring=3) as machine, small() as other:
        machine.bus.answer = lambda _address, size: (1 << 8 * size) - 1
        other.put("2a")
        with Running(machine.vcpu):
            wait_until(lambda: machine.bus.accesses)
            machine.host.map(8 << 20, other.block.address, 4096)
            wait_until(lambda: machine.bus.accesses[-1][0] == "out")
        assert machine.bus.accesses[-1] == ("out", 0x80, 1, 0)
        machine.host.close()  # before the memory of the other


def test_writes_to_read_only_memory_go_to_the_bus() -> None:
    # mov eax, [8 MiB]; mov [8 MiB], eax; hlt
    code = "a1 00 00 80 00 00 00 00 00 a3 00 00 80 00 00 00 00 00 f4"
    with small() as other, small(code) as machine:
        other.put("2a 00 00 00", 0)
        machine.host.map(8 << 20, other.block.address, 4096, read_only=True)
        machine.until_halt()
        assert machine.bus.accesses == [("store", 8 << 20, 4, 0x2A)]
        assert machine.state().registers[RAX] == 0x2A


def test_memory_that_overlaps_is_refused() -> None:
    with small() as machine:
        with pytest.raises(MachineError, match="0x1000 bytes of memory at 0x1000: it overlaps"):
            machine.host.map(0x1000, machine.block.address, 0x1000)
        machine.host.map(8 << 20, machine.block.address, 0x1000)


def test_the_log_has_the_pages_that_the_guest_wrote() -> None:
    # mov edi, 2 MiB; mov ecx, 3; l: mov [rdi], ecx; add rdi, 8192; dec ecx; jnz l; hlt
    code = "bf 00 00 20 00 b9 03 00 00 00 89 0f 48 81 c7 00 20 00 00 ff c9 75 f3 f4"
    with small(code) as machine:
        (slot,) = machine.host.slots
        with pytest.raises(UsageError, match="not logged"):
            machine.host.collect(slot)
        machine.host.log(slot, on=True)
        assert not machine.host.collect(slot)[8:].any()
        machine.until_halt()
        words = machine.host.collect(slot)
        assert len(words) == 1024 // 64
        assert list(words[8:]) == [0b10101, *[0] * 7]
        assert not machine.host.collect(slot).any()
        machine.host.log(slot, on=False)


def test_the_log_loses_no_write_of_a_guest_that_never_rests() -> None:
    # mov edi, 2 MiB; l: inc dword [rdi]; add rdi, 4096; cmp edi, 4 MiB; jb l; jmp start
    code = "bf 00 00 20 00 ff 07 48 81 c7 00 10 00 00 81 ff 00 00 40 00 72 ef eb e8"
    with small(code, ring=3) as machine:
        (slot,) = machine.host.slots
        pages = machine.block.array[2 << 20 :].view(np.uint64).reshape(512, 512)[:, 0]
        machine.host.log(slot, on=True)
        copy = pages.copy()

        def take() -> None:
            dirty = machine.host.collect(slot)[8:].view(np.uint8)
            np.copyto(copy, pages, where=np.unpackbits(dirty, bitorder="little").view(np.bool_))

        with Running(machine.vcpu):
            for _ in range(200):
                take()
            wait_until(pages.all)
            for _ in range(200):
                take()
        take()
        assert np.array_equal(copy, pages)


# Kicks


@pytest.mark.parametrize("ring", [0, 3])
def test_a_busy_guest_is_stopped_again_and_again(ring: int) -> None:
    with small(FOREVER, ring=ring) as machine, Running(machine.vcpu) as running:
        for count in range(1, 201):
            machine.vcpu.kick()
            wait_until(lambda count=count: running.returns >= count)
        assert running.error is None


def test_a_kick_from_before_the_run_is_not_lost() -> None:
    with small(FOREVER) as machine:
        machine.vcpu.kick()
        assert machine.vcpu.run() is Exit.KICKED
        assert machine.state().rip == CODE


def test_no_signal_of_a_kick_reaches_the_process() -> None:
    noticed = []
    before = signal.set_wakeup_fd(-1)
    read, write = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(write)
    numbers = [number for number in signal.valid_signals() if number >= signal.SIGRTMIN]
    old = {number: signal.signal(number, lambda *seen: noticed.append(seen)) for number in numbers}
    try:
        with small(FOREVER, ring=3) as machine, Running(machine.vcpu) as running:
            for count in range(1, 51):
                machine.vcpu.kick()
                wait_until(lambda count=count: running.returns >= count)
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)
    assert noticed == []


def test_the_interpreter_goes_on_while_the_guest_runs() -> None:
    with small(FOREVER, ring=3) as machine, Running(machine.vcpu):
        assert sum(range(1_000_000)) == 499_999_500_000


def test_several_vcpus_run_at_once() -> None:
    # lock inc dword [rdi]; jmp
    with small("f0 ff 07 eb fb", ring=3) as machine:
        state = machine.state()
        others = [machine.host.add_vcpu() for _ in range(2)]
        vcpus = [machine.vcpu, *others]
        for number, vcpu in enumerate(vcpus):
            state.cpuid = None
            state.registers[7] = DATA + 8 * number
            vcpu.write(state)
        with Running(vcpus[0]), Running(vcpus[1]), Running(vcpus[2]):
            wait_until(lambda: all(machine.word(DATA + 8 * number) > 1000 for number in range(3)))
        before = [machine.word(DATA + 8 * number) for number in range(3)]
        assert before == [machine.word(DATA + 8 * number) for number in range(3)]


# What fails


def test_a_triple_fault_names_the_registers() -> None:
    # mov eax, 0x1234; ud2, with no interrupt descriptors
    with small("b8 34 12 00 00 0f 0b") as machine:
        said = r"vCPU 0: a triple fault; rip=0x10005 .*rax=0x1234"
        with pytest.raises(CpuFailure, match=said) as caught:
            machine.vcpu.run()
        assert caught.value.registers["cr3"] == machine.state().cr3
        assert caught.value.to_json()["registers"]["rax"] == 0x1234


def test_memory_that_is_gone_ends_the_guest() -> None:
    with small(FOREVER) as machine:
        state = machine.state()
        state.cr3 = 1 << 30
        machine.vcpu.write(state)
        with pytest.raises(CpuFailure, match=r"vCPU 0: .*cr3=0x40000000"):
            machine.vcpu.run()


def test_without_the_device_there_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"there is no .*/kvm: .*kvm_intel or kvm_amd"):
        KvmHost(Recorder(), device=str(tmp_path / "kvm"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MachineError, match="file is no KVM device"):
        KvmHost(Recorder(), device=str(tmp_path / "file"))
    (tmp_path / "directory").mkdir()
    with pytest.raises(MachineError, match="directory cannot be opened: Is a directory"):
        KvmHost(Recorder(), device=str(tmp_path / "directory"))


def test_another_version_and_a_lack_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abi, "API_VERSION", 13)
    with pytest.raises(MachineError, match="expected version 13 of the interface, found 12"):
        Kvm()
    monkeypatch.undo()
    monkeypatch.setattr(Kvm, "extension", lambda _self, which: which is not abi.Capability.XCRS)
    with pytest.raises(MachineError, match=r"lacks KVM_CAP_XCRS; Linux 4\.12"):
        Kvm()


def test_a_closed_host_may_be_closed_again() -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with small() as machine:
        machine.host.close()
        machine.host.close()
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
