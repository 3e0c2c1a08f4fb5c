"""Hosted machines for tests: of every kind that this host can run, and what is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import vmferry
from vmferry.errors import MachineError
from vmferry.machines import GuestConfig, HostedMachine, MachineConfig, create
from vmferry.machines.bus import DeviceBus
from vmferry.machines.cpu_state import CpuState
from vmferry.machines.guest.console import Console, Heartbeat
from vmferry.machines.kvm import KvmHost
from vmferry.machines.observer import check

MIB = 1 << 20
PAGE = 4096


def _kvm_is_missing() -> str:
    """Why machines cannot be on KVM here; nothing if they can."""
    try:
        KvmHost(DeviceBus()).close()
    except MachineError as error:
        return str(error)
    return ""


NO_KVM = _kvm_is_missing()
KVM = pytest.param("kvm", marks=pytest.mark.skipif(bool(NO_KVM), reason=NO_KVM))
KINDS = ["unicorn", KVM]


def config(kind: str, *, cpus: int = 1, ram: int = 8 * MIB, **guest: object) -> MachineConfig:
    """A small machine."""
    guest = {"working_set": MIB, "heartbeat": 0.01} | guest
    return MachineConfig(kind=kind, ram=ram, cpus=cpus, guest=GuestConfig(**guest))  # type: ignore[arg-type]


class Hosted:
    """A machine and its console."""

    def __init__(self, config: MachineConfig, stack: ExitStack) -> None:
        self.config = config
        self.console = Console()
        self.machine: HostedMachine = stack.enter_context(create(config, serial=self.console.feed))

    @property
    def ram(self) -> np.ndarray:
        return self.machine.memory["ram"].array

    def page(self, number: int) -> np.ndarray:
        """A page of the working set."""
        start = self.machine.layout.base + number * PAGE
        return self.ram[start : start + PAGE]

    def counters(self, vcpu: int = 0) -> np.ndarray:
        """The words of a vCPU's block; see BLOCK and OFFSETS."""
        start = self.machine.layout.block(vcpu)
        return self.ram[start : start + PAGE].view("<u8")

    def cpu(self, vcpu: int = 0) -> CpuState:
        """What a vCPU of the paused machine holds; ``post_load`` gives it back."""
        section = self.machine.registry.find("cpu", vcpu)
        assert section is not None
        assert isinstance(section.owner, CpuState)
        section.owner.pre_save()
        return section.owner

    def run_until_filled(self) -> Hosted:
        self.machine.start()
        self.console.wait_filled()
        return self

    def fresh_beat(self) -> Heartbeat:
        """A heartbeat of a time after this call; the next one may be on its way already."""
        self.console.wait_beat()
        return self.console.wait_beat()

    def run_on(self) -> None:
        """Run until the guest has walked over all of its pages twice more."""
        target = self.console.wait_beat()
        pages = self.machine.layout.pages
        while (
            beat := self.console.wait_beat()
        ).hot + beat.cold < target.hot + target.cold + 2 * pages:
            pass

    def findings(self) -> list[str]:
        """What the observer says of the machine, which is paused for it."""
        self.machine.pause()
        return [finding.text for finding in check(self.machine.memory, self.config)]


def move(source: Hosted, target: Hosted, directory: Path) -> None:
    """The whole state of a paused machine into another that never ran."""
    source.machine.pause()
    vmferry.save(source.machine, directory / "state")
    target.ram[:] = source.ram
    vmferry.load(target.machine, directory / "state")


Start = Callable[..., Hosted]


@pytest.fixture
def hosted() -> Iterator[Start]:
    """Makes machines that end with the test."""
    with ExitStack() as stack:
        yield lambda kind, **options: Hosted(config(kind, **options), stack)
