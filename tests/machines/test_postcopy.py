"""A hosted machine runs before its memory has come, and finds all of it as it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from random import Random

import pytest

import vmferry
from tests.machines.hosted import KINDS, MIB, Start
from tests.machines.lazily import LONG, Begun, Waiting, restore, restore_with_losses, saved
from tests.transports.support import wait_until
from vmferry.checkpoint.restore import Restore
from vmferry.errors import UsageError
from vmferry.memory import faults
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.qemu import QmpError
from vmferry.qemu.machine_process import MachineProcess

# A guest without a rate would have asked for all of its memory before anything can be lost.
GUEST = {"ram": 32 * MIB, "working_set": 8 * MIB, "hot": 0.5, "cpus": 2, "rate": 1500}

NO_FAULTS = faults.missing(kernel=True)
pytestmark = pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))


@pytest.fixture
def save(hosted: Start, tmp_path: Path) -> Iterator[Callable[[str], vmferry.Checkpoint]]:
    with ExitStack() as stack:
        yield lambda kind: saved(hosted(kind, **GUEST), tmp_path, stack)


@pytest.fixture
def waiting(hosted: Start) -> Iterator[Callable[[str, bool], Waiting]]:
    with ExitStack() as stack:
        yield lambda kind, preempt: Waiting(
            hosted(kind, **GUEST), stack, *(["postcopy-preempt"] if preempt else [])
        )


PREEMPT = pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])


@PREEMPT
@pytest.mark.parametrize("kind", KINDS)
def test_guest_runs_at_once_and_is_whole(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    tmp_path: Path,
    kind: str,
    preempt: bool,
) -> None:
    checkpoint = save(kind)
    there = waiting(kind, preempt)
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    # So slow that the guest comes before the background does.
    result = restore(checkpoint, uri, preempt=preempt, bandwidth=float(16 * MIB))
    assert result.requests > 0
    there.is_whole()
    assert there.statuses == ["setup", "active", "postcopy-active", "completed"]
    assert there.warnings == []


@pytest.mark.parametrize("kind", KINDS)
def test_destination_tells_how_long_its_processors_waited(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    tmp_path: Path,
    kind: str,
) -> None:
    checkpoint = save(kind)
    there = waiting(kind, False)
    there.control.set_capabilities({"postcopy-blocktime": True})
    began = time.monotonic()
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    restore(checkpoint, uri, bandwidth=float(4 * MIB))
    there.is_whole()
    most = (time.monotonic() - began) * 1e3
    info = there.control.query()
    each, together = info["postcopy-vcpu-blocktime"], info["postcopy-blocktime"]
    assert len(each) == GUEST["cpus"]
    assert 0 <= together <= min(each)
    assert 0 < max(each) < most


def test_host_that_does_not_say_who_waits_is_found_out_before_the_machine_comes(
    hosted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "_THREADS", 1 << 60)  # which no kernel has
    with closing(Control(hosted("unicorn", **GUEST).machine, awaited=True)) as control:
        control.set_capabilities({"postcopy-ram": True})
        with pytest.raises(UsageError, match="says which thread waits"):
            control.set_capabilities({"postcopy-blocktime": True})
        assert "postcopy-blocktime" not in control.capabilities


@pytest.mark.parametrize("kind", KINDS)
def test_machine_that_came_so_moves_on(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    hosted: Start,
    tmp_path: Path,
    kind: str,
) -> None:
    """Also where all of its memory was taken before; nothing is left of faults and marks."""
    checkpoint = save(kind)
    there = waiting(kind, False)
    there.guest.machine.memory["ram"].preallocate()
    restore(checkpoint, there.control.incoming(f"unix:{tmp_path}/there"))
    there.is_whole()
    there.guest.machine.resume()
    there.control.set_capabilities({"postcopy-ram": False})
    further = hosted(kind, **GUEST)
    with closing(Control(further.machine, awaited=True)) as control:
        there.control.set_parameters({"max-bandwidth": 0})
        there.control.migrate(control.incoming(f"unix:{tmp_path}/further"))
        assert there.control.wait(LONG) == Status.COMPLETED
        assert control.wait(LONG) == Status.COMPLETED
        further.run_on()
        assert further.findings() == []


@PREEMPT
@pytest.mark.parametrize("kind", KINDS)
def test_source_is_lost_and_comes_back(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    tmp_path: Path,
    kind: str,
    preempt: bool,
) -> None:
    checkpoint = save(kind)
    there = waiting(kind, preempt)
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    for number in range(4):
        begun = Begun(checkpoint, uri, preempt=preempt, bandwidth=float(2 * MIB), resume=number > 0)
        there.wait_until_running()
        begun.wait_pages(50)
        begun.cut()
        there.wait_for(Status.POSTCOPY_PAUSED)
        info = there.control.query()
        assert "connection" in info["error-desc"]
        assert "socket-address" not in info
        uri = there.control.recover(f"unix:{tmp_path}/again-{number}")
        assert there.control.query()["socket-address"][0]["path"] in uri
    restore(checkpoint, uri, preempt=preempt, resume=True)
    there.is_whole()
    cycle = ["postcopy-active", "postcopy-paused", "postcopy-recover"]
    assert there.statuses == ["setup", "active", *cycle * 4, "postcopy-active", "completed"]
    assert len(there.warnings) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_lost_at_any_moment_nothing_is_wrong(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    tmp_path: Path,
    kind: str,
) -> None:
    """The connection, or the pager; ``make soak`` does it more often."""
    choose = Random(kind)  # noqa: S311 - nothing secret
    checkpoint = save(kind)
    losses = 0
    for move in range(3):
        preempt = choose.random() < 0.5
        directory = tmp_path / str(move)
        directory.mkdir()
        there = waiting(kind, preempt)
        losses += restore_with_losses(checkpoint, there, directory, choose, preempt)
        there.is_whole()
        there.control.close()
    assert losses > 5


@pytest.mark.parametrize("kind", KINDS)
def test_machine_that_lacks_memory_can_be_ended(
    save: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[[str, bool], Waiting],
    tmp_path: Path,
    kind: str,
) -> None:
    checkpoint = save(kind)
    there = waiting(kind, False)
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    begun = Begun(checkpoint, uri, bandwidth=float(MIB))
    there.wait_until_running()
    begun.wait_pages(1)
    begun.cut()
    there.wait_for(Status.POSTCOPY_PAUSED)
    there.control.close()
    assert there.control.status is Status.FAILED
    assert not there.guest.machine.running


@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_restore_does_it_all_by_the_monitor(hosted: Start, tmp_path: Path, paused: bool) -> None:
    """A machine that stood still stands still, but for that it is the same."""
    with ExitStack() as stack:
        guest = hosted("unicorn", **GUEST)
        checkpoint = saved(guest, tmp_path, stack, paused=paused)
        there = stack.enter_context(MachineProcess(guest.config, incoming="defer"))
        uri = f"unix:{tmp_path}/there"
        result = Restore(checkpoint, uri, qmp=there.qmp, learn=False).run()
        assert (result.running is None) == paused
        wait_until(lambda: there.qmp.execute("query-migrate")["status"] == "completed")
        state = there.qmp.execute("query-status")["status"]
        assert state == ("paused" if paused else "running")
        there.qmp.execute("cont")
        there.console.wait_beat()
        there.qmp.execute("stop")
        there.check()


def test_memory_is_not_checked_before_it_is_there(hosted: Start, tmp_path: Path) -> None:
    with ExitStack() as stack:
        guest = hosted("unicorn", **GUEST)
        checkpoint = saved(guest, tmp_path, stack, paused=True)
        there = stack.enter_context(MachineProcess(guest.config, incoming="defer"))
        states = [{"capability": "postcopy-ram", "state": True}]
        there.qmp.execute("migrate-set-capabilities", {"capabilities": states})
        uri = f"unix:{tmp_path}/there"
        there.qmp.execute("migrate-incoming", {"uri": uri})
        begun = Begun(checkpoint, uri, bandwidth=float(MIB))
        wait_until(lambda: there.qmp.execute("query-status")["status"] == "paused")
        begun.cut()
        with pytest.raises(QmpError, match="still on its way"):
            there.qmp.execute("x-vmferry-check")
        # It ends though it waits for memory, and though nobody comes with that.
        there.quit()
