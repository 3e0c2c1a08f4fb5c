"""A machine that runs here goes to a stock QEMU before its memory, which it asks for.

The machine is one that QEMU has saved, so that QEMU can load it: its devices are sent as they are
stored, and a processor of this process writes where the guest does not look.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest

import vmferry
from tests.interop.lab import PATIENCE, PC, Lab, Vm, wait_until
from tests.migration.relay import Relay
from vmferry import Registry
from vmferry.images import Image
from vmferry.memory import DirtyLog, GuestMemory, MemoryBlock, open_dirty_log
from vmferry.migration import live
from vmferry.migration.bitmaps import DirtyBitmap
from vmferry.migration.capabilities import Capability
from vmferry.migration.control import Control
from vmferry.migration.machine import LiveMachine
from vmferry.migration.machine_source import MachineSource
from vmferry.migration.status import Status
from vmferry.wire.commands import PostcopyListen

pytestmark = pytest.mark.qemu

PAGE = 4096
AWAY = 4 << 20
"""Where the guest has nothing: its image and what it walks over end before."""
SLOW = 4 << 20


class Borrowed:
    """A machine that was saved, with a processor that counts in each page behind :data:`AWAY`."""

    uuid: UUID | None = None
    images: Sequence[Image] = ()

    def __init__(self, checkpoint: vmferry.Checkpoint) -> None:
        configuration = checkpoint.configuration
        assert configuration is not None
        self.name = configuration.machine
        self.checkpoint = checkpoint
        self.registry = Registry()
        self.memory = GuestMemory()
        for block in checkpoint.blocks:
            made = self.memory.add(block.name, block.length)
            pages = checkpoint.memory(block)
            assert pages is not None
            pages.read(0, made.view)
            if block.length == PC.ram_size:
                self.ram: MemoryBlock = made
        self._words = self.ram.array.view(np.uint64)[AWAY // 8 :: PAGE // 8]
        self._turn = threading.Lock()
        self._may_run = threading.Event()
        self._may_run.set()
        self._closed = False
        self.count = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._may_run.is_set()

    def pause(self) -> None:
        self._may_run.clear()
        with self._turn:
            pass

    def resume(self) -> None:
        self._may_run.set()

    @property
    def vcpu_threads(self) -> list[int]:
        return [self._thread.native_id or 0]

    def throttle(self, percent: int) -> None:
        pass

    def dirty_log(self) -> DirtyLog:
        return open_dirty_log(self.memory)

    def _run(self) -> None:
        while not self._closed:
            if self._may_run.wait(0.05):
                with self._turn:
                    if self.running:
                        self.count += 1
                        self._words[:] = self.count
                time.sleep(0.005)

    def close(self) -> None:
        self._closed = True
        self._thread.join()
        self.memory.close()


class Replayed(MachineSource):
    """What its source sends: the devices as they were saved."""

    def __init__(
        self,
        machine: LiveMachine,
        capabilities: frozenset[Capability],
        bitmaps: Iterable[DirtyBitmap],
    ) -> None:
        assert isinstance(machine, Borrowed)
        super().__init__(machine, capabilities, bitmaps)
        saved = machine.checkpoint
        assert saved.configuration is not None
        self.configuration = saved.configuration
        self._stored = saved

    @property
    def numbers(self) -> frozenset[int]:
        return self._stored.numbers

    @property
    def devices(self) -> list[bytes]:
        return self._stored.devices


class Moving:
    """A machine here, and a QEMU that waits for it."""

    def __init__(
        self,
        lab: Lab,
        stack: ExitStack,
        monkeypatch: pytest.MonkeyPatch,
        capabilities: Sequence[str] = (),
    ) -> None:
        monkeypatch.setattr(live, "MachineSource", Replayed)
        self._lab, self._stack = lab, stack
        before = lab.source()
        checkpoint = lab.receive(before)
        self._after = before.serial.drain()
        before.qemu.stop()
        self.here = Borrowed(checkpoint)
        stack.callback(self.here.close)
        self.statuses: list[object] = []
        self.source = Control(self.here, notify=self._note)
        stack.callback(self.source.close)
        names = ("postcopy-ram", *capabilities)
        self.source.set_capabilities(dict.fromkeys(("events", *names), True))
        self.source.set_parameters({"max-bandwidth": SLOW, "downtime-limit": 0})
        self.there: Vm = lab.destination()
        self._uri = f"unix:{lab.directory()}/s"
        self.there.qemu.incoming(self._uri, capabilities=names)
        self._relays: list[Relay] = []

    def _note(self, name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION":
            self.statuses.append(data["status"])

    def relayed(self, uri: str, cut_at: bytes | None = None) -> str:
        relay = Relay(f"unix:{self._lab.directory()}/r", uri, trigger=cut_at)
        self._relays.append(self._stack.enter_context(relay))
        return relay.address

    def begin(self, cut_at: bytes | None = None) -> None:
        self.source.migrate(self.relayed(self._uri, cut_at))
        self.wait_for(Status.ACTIVE)

    def wait_for(self, status: Status) -> None:
        wait_until(lambda: self.source.status is status)

    def ram(self, what: str) -> int:
        return int(self.source.query()["ram"][what])

    def cut(self) -> None:
        self._relays[-1].cut()

    def recover(self) -> None:
        wait_until(lambda: self.there.status() == "postcopy-paused")
        uri = f"unix:{self._lab.directory()}/again"
        self.there.qemu.execute("migrate-recover", {"uri": uri})
        self.source.resume(self.relayed(uri))

    def is_whole(self) -> None:
        """The guest goes on there, with what the processor here had written last."""
        assert self.source.wait(PATIENCE) == Status.COMPLETED, self.source.error
        self.there.qemu.wait_migration()
        assert not self.here.running
        self._lab.assert_counts(self.there, self._after)
        path = Path(self.there.qemu.directory) / "away"
        self.there.qemu.save_memory(path, AWAY, PC.ram_size - AWAY)
        words = np.fromfile(path, np.uint64)[:: PAGE // 8]
        assert self.here.count > 0
        assert set(words.tolist()) == {self.here.count}

    def stays(self) -> None:
        """The machine runs here."""
        assert self.here.running
        count = self.here.count
        wait_until(lambda: self.here.count > count)


Make = Callable[..., Moving]


@pytest.fixture
def moving(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda *names: Moving(lab, stack, monkeypatch, names)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_machine_goes_in_the_middle_of_its_first_round(moving: Make, preempt: bool) -> None:
    machine = moving(*(["postcopy-preempt"] if preempt else []))
    machine.source.set_parameters({"max-postcopy-bandwidth": 1 << 20})
    machine.begin()
    machine.source.start_postcopy()
    machine.wait_for(Status.POSTCOPY_ACTIVE)
    # The limit is for what nobody asks for.
    wait_until(lambda: machine.ram("postcopy-requests") > 0)
    machine.source.set_parameters({"max-postcopy-bandwidth": 0})
    machine.is_whole()
    assert machine.statuses == ["setup", "active", "postcopy-active", "completed"]
    assert machine.ram("postcopy-bytes") > 0


def test_what_was_written_behind_its_page_is_forgotten_there(moving: Make) -> None:
    """After some rounds all of memory was sent, and most of it is out of date."""
    machine = moving()
    machine.source.set_parameters({"max-bandwidth": 0})
    machine.begin()
    wait_until(lambda: machine.ram("dirty-sync-count") > 4)
    machine.source.start_postcopy()
    machine.is_whole()


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
def test_lost_connections_are_taken_up(moving: Make, preempt: bool) -> None:
    machine = moving(*(["postcopy-preempt"] if preempt else []))
    machine.source.set_parameters({"max-postcopy-bandwidth": SLOW})
    machine.begin()
    machine.source.start_postcopy()
    for _ in range(2):
        machine.wait_for(Status.POSTCOPY_ACTIVE)
        enough = machine.ram("normal") + 100
        wait_until(lambda: machine.ram("normal") > enough)  # noqa: B023
        machine.cut()
        machine.wait_for(Status.POSTCOPY_PAUSED)
        machine.recover()
        wait_until(lambda: machine.source.status is not Status.POSTCOPY_PAUSED)
    machine.source.set_parameters({"max-postcopy-bandwidth": 0})
    machine.is_whole()
    cycle = ["postcopy-active", "postcopy-paused", "postcopy-recover"]
    assert machine.statuses == ["setup", "active", *cycle * 2, "postcopy-active", "completed"]


def test_qemu_that_dies_before_it_has_the_machine_leaves_it_here(moving: Make) -> None:
    machine = moving()
    machine.begin()
    machine.there.qemu.stop()
    assert machine.source.wait(PATIENCE) == Status.FAILED
    machine.stays()


def test_qemu_that_dies_with_the_machine_does_not_bring_it_back(moving: Make) -> None:
    machine = moving()
    machine.source.set_parameters({"max-postcopy-bandwidth": SLOW})
    machine.begin()
    machine.source.start_postcopy()
    machine.wait_for(Status.POSTCOPY_ACTIVE)
    machine.there.qemu.stop()
    machine.wait_for(Status.POSTCOPY_PAUSED)
    machine.source.cancel()
    assert machine.source.status is Status.POSTCOPY_PAUSED
    assert not machine.here.running


def test_connection_that_breaks_with_the_package_leaves_it_to_an_operator(moving: Make) -> None:
    """A QEMU runs what it has loaded and says so afterwards: nobody knows whether it has."""
    machine = moving()
    machine.begin(cut_at=PostcopyListen().encode())
    machine.source.start_postcopy()
    assert machine.source.wait(PATIENCE) == Status.FAILED
    assert "the destination was sent the machine" in str(machine.source.error)
    assert machine.source.in_doubt
    assert not machine.here.running
    machine.source.cont()
    machine.stays()


def test_cancel_before_it_has_gone_leaves_it_here(moving: Make) -> None:
    machine = moving()
    machine.begin()
    machine.source.cancel()
    assert machine.source.wait(PATIENCE) == Status.CANCELLED
    machine.stays()
