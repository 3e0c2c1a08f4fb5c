"""A hosted machine runs before its memory has come, and finds all of it as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import vmferry
from tests.machines.hosted import KINDS, MIB, Hosted, Start
from tests.transports.support import PROMPT, background
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

    def is_whole(self) -> None:
        """Everything has come, and the guest finds nothing wrong, nor does anybody else."""
        assert self.control.wait(LONG) == Status.COMPLETED, self.control.query()
        self.guest.run_on()
        assert self.guest.findings() == []


@pytest.fixture
def waiting(hosted: Start) -> Iterator[Callable[..., Waiting]]:
    with ExitStack() as stack:
        yield lambda kind, *capabilities: Waiting(hosted(kind, **GUEST), stack, *capabilities)


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
