"""A hosted machine runs before its memory has come, and finds all of it as it was."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

import vmferry
from tests.machines.hosted import KINDS, MIB, Hosted, Start
from tests.transports.support import PROMPT, background, wait_until
from vmferry.checkpoint.restore import Restore, Restored
from vmferry.memory import faults
from vmferry.migration.control import Control
from vmferry.migration.postcopy.source import LazyOptions
from vmferry.migration.status import Status

LONG = 60.0
GUEST = {"ram": 32 * MIB, "working_set": 8 * MIB, "hot": 0.5, "cpus": 2}

NO_FAULTS = faults.missing(kernel=True)
pytestmark = pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))


@pytest.fixture
def saved(hosted: Start, tmp_path: Path) -> Iterator[Callable[[str], vmferry.Checkpoint]]:
    """Saves a guest of a kind, in the middle of its work."""
    with ExitStack() as stack:

        def save(kind: str) -> vmferry.Checkpoint:
            guest = hosted(kind, **GUEST).run_until_filled()
            control = Control(guest.machine)
            stack.callback(control.close)
            uri = f"unix:{tmp_path}/saving"
            listening = threading.Event()
            receiving = background(
                lambda: vmferry.receive(uri, tmp_path / "saved", started=lambda _: listening.set())
            )
            assert listening.wait(PROMPT)
            control.migrate(uri)
            return stack.enter_context(receiving.result(LONG))

        yield save


class Waiting:
    """A machine that waits for its state and lets it come by postcopy."""

    def __init__(self, guest: Hosted, stack: ExitStack, *capabilities: str) -> None:
        self.guest = guest
        self.warnings: list[str] = []
        self.statuses: list[str] = []
        self.control = Control(guest.machine, notify=self._note, awaited=True)
        stack.callback(self.control.close)
        names = ("postcopy-ram", "events", *capabilities)
        self.control.set_capabilities(dict.fromkeys(names, True))

    def _note(self, event: str, data: dict[str, object]) -> None:
        if event == "VMFERRY_WARNING":
            self.warnings.append(str(data["message"]))
        if event == "MIGRATION":
            self.statuses.append(str(data["status"]))

    def wait_for(self, status: Status) -> None:
        wait_until(lambda: self.control.status is status, LONG)

    def is_whole(self) -> None:
        """Everything has come, and the guest finds nothing wrong, nor does anybody else."""
        assert self.control.wait(LONG) == Status.COMPLETED, self.control.query()
        self.guest.run_on()
        assert self.guest.findings() == []


@pytest.fixture
def waiting(hosted: Start) -> Iterator[Callable[..., Waiting]]:
    with ExitStack() as stack:
        yield lambda kind, *capabilities: Waiting(hosted(kind, **GUEST), stack, *capabilities)


def pagers() -> list[int]:
    """The processes of pagers that this one has."""
    children = [
        int(child)
        for thread in Path("/proc/self/task").iterdir()
        for child in (thread / "children").read_text().split()
    ]
    return [
        child
        for child in children
        if b"postcopy.pager" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def restore(checkpoint: vmferry.Checkpoint, uri: str, **options: object) -> Restored:
    lazy = LazyOptions(**options)  # type: ignore[arg-type]
    return Restore(checkpoint, uri, options=lazy, learn=False).run()


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("kind", KINDS)
def test_guest_runs_at_once_and_is_whole(
    saved: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[..., Waiting],
    tmp_path: Path,
    kind: str,
    preempt: bool,
) -> None:
    checkpoint = saved(kind)
    there = waiting(kind, *(["postcopy-preempt"] if preempt else []))
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    # So slow that the guest comes before the background does.
    result = restore(checkpoint, uri, preempt=preempt, bandwidth=float(16 * MIB))
    assert result.requests > 0
    there.is_whole()
    assert there.statuses == ["setup", "active", "postcopy-active", "completed"]
    assert there.warnings == []


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("kind", KINDS)
def test_source_is_lost_and_comes_back(
    saved: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[..., Waiting],
    tmp_path: Path,
    kind: str,
    preempt: bool,
) -> None:
    checkpoint = saved(kind)
    there = waiting(kind, *(["postcopy-preempt"] if preempt else []))
    uri = there.control.incoming(f"unix:{tmp_path}/there")
    for number in range(4):
        begun = Begun(checkpoint, uri, preempt=preempt, bandwidth=float(4 * MIB), resume=number > 0)
        there.wait_for(Status.POSTCOPY_ACTIVE)
        begun.wait_pages(100)
        begun.cut()
        there.wait_for(Status.POSTCOPY_PAUSED)
        assert "connection" in there.control.query()["error-desc"]
        uri = there.control.recover(f"unix:{tmp_path}/again-{number}")
    restore(checkpoint, uri, preempt=preempt, resume=True)
    there.is_whole()
    cycle = ["postcopy-active", "postcopy-paused", "postcopy-recover"]
    assert there.statuses == ["setup", "active", *cycle * 4, "postcopy-active", "completed"]
    assert len(there.warnings) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_lost_at_any_moment_nothing_is_wrong(
    saved: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[..., Waiting],
    tmp_path: Path,
    kind: str,
    seed: int,
) -> None:
    """The connection, or the pager; while the guest waits for pages, and its devices are loaded."""
    choose = Random(seed)  # noqa: S311 - nothing secret
    checkpoint = saved(kind)
    for move in range(3):
        preempt = choose.random() < 0.5
        there = waiting(kind, *(["postcopy-preempt"] if preempt else []))
        uri = there.control.incoming(f"unix:{tmp_path}/{move}")
        losses = choose.randrange(1, 4)
        for number in range(losses):
            begun = Begun(
                checkpoint, uri, preempt=preempt, bandwidth=float(6 * MIB), resume=number > 0
            )
            there.wait_for(Status.POSTCOPY_ACTIVE)
            begun.wait_pages(choose.randrange(300))
            if choose.random() < 0.3:
                (pager,) = pagers()
                os.kill(pager, signal.SIGKILL)
                begun.wait_lost()
            else:
                begun.cut()
            there.wait_for(Status.POSTCOPY_PAUSED)
            uri = there.control.recover(f"unix:{tmp_path}/{move}-{number}")
        restore(checkpoint, uri, preempt=preempt, resume=True)
        there.is_whole()
        there.control.close()


class Begun:
    """A restore at work, which can be broken off."""

    def __init__(self, checkpoint: vmferry.Checkpoint, uri: str, **options: object) -> None:
        self.pages = 0
        lazy = LazyOptions(**options)  # type: ignore[arg-type]
        self._restore = Restore(checkpoint, uri, options=lazy, learn=False, progress=self._note)
        self._done = background(self._restore.run)

    def _note(self, progress: vmferry.Progress) -> None:
        self.pages = progress.normal_pages

    def wait_pages(self, pages: int) -> None:
        """Wait until so many pages were sent."""
        wait_until(lambda: self.pages >= pages or self._done.done(), LONG)

    def cut(self) -> None:
        self._restore.cancel()
        self.wait_lost()

    def wait_lost(self) -> None:
        assert self._done.exception(LONG) is not None


@pytest.mark.parametrize("kind", KINDS)
def test_machine_that_lacks_memory_can_be_ended(
    saved: Callable[[str], vmferry.Checkpoint],
    waiting: Callable[..., Waiting],
    tmp_path: Path,
    kind: str,
) -> None:
    checkpoint = saved(kind)
    there = waiting(kind)
    begun = Begun(
        checkpoint,
        there.control.incoming(f"unix:{tmp_path}/there"),
        bandwidth=float(MIB),
    )
    there.wait_for(Status.POSTCOPY_ACTIVE)
    begun.wait_pages(1)
    begun.cut()
    there.wait_for(Status.POSTCOPY_PAUSED)
    there.control.close()
    assert there.control.status is Status.FAILED
    assert not there.guest.machine.running
