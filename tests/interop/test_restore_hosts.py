"""Saved machines that run at once where the host gives them other processors or other pages."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

import vmferry
from tests.interop.lab import PC, Lab, Vm
from tests.support.capture import Scenario
from vmferry.migration.postcopy.source import LazyOptions

pytestmark = pytest.mark.qemu

HUGE = 2 << 20
KVM = replace(
    PC,
    machine=("-machine", "pc,accel=kvm", "-nodefaults"),
    start="firmware",
    guest=(("pages", 64), ("hot", 16)),
    memory=2,
    bandwidth=1 << 20,
)


class HugeScenario(Scenario):
    """A machine whose memory consists of huge pages, or could: its size is a multiple of them."""

    @property
    def ram_size(self) -> int:
        return self.memory << 20


def machine_in(options: str) -> Scenario:
    """A machine of 16 MiB in memory of a kind of its own."""
    backend = f"memory-backend-memfd,id=ram,size={{ram}}{options}"
    machine = ("-machine", "pc,memory-backend=ram", "-nodefaults", "-object", backend)
    return HugeScenario(machine=machine, guest=PC.guest, bandwidth=PC.bandwidth)


def saved_at_rest(lab: Lab, scenario: Scenario) -> tuple[Vm, vmferry.Checkpoint]:
    """Saved while it stood: QEMU loses writes in blocks of this size (see Scenario.ram_size)."""
    source = lab.source(scenario)
    source.qemu.execute("stop")
    return source, lab.receive(source, scenario)


def restored(lab: Lab, checkpoint: vmferry.Checkpoint, scenario: Scenario, *, preempt: bool) -> Vm:
    vm = lab.destination(scenario)
    uri = f"unix:{lab.directory()}/socket"
    checkpoint.serve(uri, qmp=vm.qemu.qmp, options=LazyOptions(preempt=preempt))
    vm.qemu.wait_migration()
    return vm


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no KVM on this machine")
@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_machine_under_kvm_goes_on(lab: Lab, preempt: bool) -> None:
    """The kernel runs the guest, and its faults are those of the kernel."""
    try:
        source = lab.source(KVM)
    except vmferry.PeerError as error:
        pytest.skip(f"KVM does not work on this machine: {error}")
    checkpoint = lab.receive(source, KVM)
    lab.assert_goes_on(restored(lab, checkpoint, KVM, preempt=preempt), source, KVM)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("saved_in", ["", ",hugetlb=on,hugetlbsize=2M"], ids=["small", "huge"])
def test_machine_in_huge_pages_goes_on(lab: Lab, saved_in: str, preempt: bool) -> None:
    """It is given whole huge pages: there is no placing a part of one."""
    scenario = machine_in(",hugetlb=on,hugetlbsize=2M")
    free = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    if free * HUGE < 2 * scenario.ram_size:
        pytest.skip(f"{free} huge pages are free here, 16 are needed: vm.nr_hugepages")
    source, checkpoint = saved_at_rest(lab, machine_in(saved_in))
    vm = restored(lab, checkpoint, scenario, preempt=preempt)
    assert "2 MiB" in vm.qemu.hmp("info ramblock")
    vm.qemu.execute("cont")
    lab.assert_goes_on(vm, source, scenario)
