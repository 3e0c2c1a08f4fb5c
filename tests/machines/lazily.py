"""Saved guests, and machines that let them come by postcopy, whatever is lost on the way."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from random import Random

import vmferry
from tests.machines.hosted import MIB, Hosted
from tests.support.processes import pagers
from tests.transports.support import PROMPT, background, wait_until
from vmferry.checkpoint.restore import Restore, Restored
from vmferry.migration.control import Control
from vmferry.migration.postcopy.source import LazyOptions
from vmferry.migration.status import ENDS, Status

LONG = 60.0


def saved(
    guest: Hosted, directory: Path, stack: ExitStack, *, paused: bool = False
) -> vmferry.Checkpoint:
    """The guest, in the middle of its work."""
    guest.run_until_filled()
    if paused:
        guest.machine.pause()
    control = Control(guest.machine)
    stack.callback(control.close)
    uri = f"unix:{directory}/saving"
    listening = threading.Event()
    receiving = background(
        lambda: vmferry.receive(uri, directory / "saved", started=lambda _: listening.set())
    )
    assert listening.wait(PROMPT)
    control.migrate(uri)
    return stack.enter_context(receiving.result(LONG))


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

    def wait_for(self, *statuses: Status) -> Status:
        wait_until(lambda: self.control.status in {*statuses, *ENDS}, LONG)
        found = self.control.status
        assert found in statuses, (found, self.warnings)
        return found

    def wait_until_running(self) -> None:
        """Wait until memory comes and the machine runs: from then on nothing is given up."""
        self.wait_for(Status.POSTCOPY_ACTIVE)
        wait_until(lambda: self.guest.machine.running, LONG)

    def is_whole(self) -> None:
        """Everything has come, and the guest finds nothing wrong, nor does anybody else."""
        assert self.control.wait(LONG) == Status.COMPLETED, self.control.query()
        self.guest.run_on()
        assert self.guest.findings() == []


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

    @property
    def was_lost(self) -> bool:
        """Whether it did not come to its end."""
        return self._done.exception(LONG) is not None


def restore(checkpoint: vmferry.Checkpoint, uri: str, **options: object) -> Restored:
    lazy = LazyOptions(**options)  # type: ignore[arg-type]
    return Restore(checkpoint, uri, options=lazy, learn=False).run()


def restore_with_losses(
    checkpoint: vmferry.Checkpoint, there: Waiting, directory: Path, choose: Random, preempt: bool
) -> int:
    """Lose the connection or the pager, by chance, and go on each time; how often it was."""
    uri = there.control.incoming(f"unix:{directory}/there")
    losses = choose.randrange(1, 4)
    for number in range(losses):
        begun = Begun(checkpoint, uri, preempt=preempt, bandwidth=float(6 * MIB), resume=number > 0)
        there.wait_until_running()
        begun.wait_pages(choose.randrange(100))
        if choose.random() < 0.3:
            for pager in pagers(os.getpid()):
                os.kill(pager, signal.SIGKILL)
        else:
            begun.cut()
        has_ended = there.wait_for(Status.POSTCOPY_PAUSED, Status.COMPLETED) is Status.COMPLETED
        if not begun.was_lost or has_ended:
            return number  # the machine has asked for all of its memory in no time
        uri = there.control.recover(f"unix:{directory}/again-{number}")
    restore(checkpoint, uri, preempt=preempt, resume=True)
    return losses
