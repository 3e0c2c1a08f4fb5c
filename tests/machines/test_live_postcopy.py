"""A machine that runs goes before its memory, which follows when it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machines.hosted import KINDS, MIB, Start
from tests.migration.relay import Relay
from tests.transports.support import wait_until
from vmferry.errors import UsageError
from vmferry.memory import faults
from vmferry.migration.control import Control
from vmferry.migration.status import Status

LONG = 60.0
# It writes so much that precopy at the rate below never ends.
GUEST = {"ram": 16 * MIB, "working_set": 8 * MIB, "hot": 0.8}
SLOW = 8 * MIB

NO_FAULTS = faults.missing(kernel=True)
pytestmark = pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))


class Pair:
    """A running machine, and one that waits for it."""

    def __init__(
        self, start: Start, stack: ExitStack, kind: str, path: Path, names: tuple[str, ...]
    ) -> None:
        self.path, self._stack = path, stack
        self.relays: list[Relay] = []
        self.here, self.there = start(kind, **GUEST), start(kind, **GUEST)
        self.here.run_until_filled()
        self.source = Control(self.here.machine, notify=self._note)
        stack.callback(self.source.close)
        self.destination = Control(self.there.machine, awaited=True)
        stack.callback(self.destination.close)
        self.statuses: list[object] = []
        on = dict.fromkeys(("postcopy-ram", "events", *names), True)
        self.source.set_capabilities(on)
        self.destination.set_capabilities(on)
        # Slow, so that the guest asks before the background has come.
        self.source.set_parameters({"max-bandwidth": SLOW, "max-postcopy-bandwidth": SLOW})

    def _note(self, name: str, data: dict[str, object]) -> None:
        if name == "MIGRATION":
            self.statuses.append(data["status"])

    def begin(self) -> None:
        self.source.migrate(self._relayed(self.destination.incoming(f"unix:{self.path}/there")))
        wait_until(lambda: self.source.status is Status.ACTIVE, LONG)

    def _relayed(self, uri: str) -> str:
        relay = Relay(f"unix:{self.path}/relay-{len(self.relays)}", uri)
        self.relays.append(self._stack.enter_context(relay))
        return relay.address

    def cut(self) -> None:
        """Break all connections."""
        self.relays[-1].cut()

    def recover(self) -> None:
        """Bring them together again."""
        number = len(self.relays)
        uri = self.destination.recover(f"unix:{self.path}/again-{number}")
        self.source.resume(self._relayed(uri))

    def is_whole(self) -> None:
        """The machine runs there, nothing of it is lost, and nothing runs here."""
        assert self.source.wait(LONG) == Status.COMPLETED, self.source.query()
        assert self.destination.wait(LONG) == Status.COMPLETED, self.destination.query()
        assert not self.here.machine.running
        self.there.run_on()
        assert self.there.findings() == []

    def stays(self) -> None:
        """The machine runs here as before, and never did there."""
        self.here.run_on()
        assert self.here.findings() == []
        assert not self.there.machine.running


Make = Callable[..., Pair]


@pytest.fixture
def pair(hosted: Start, tmp_path: Path) -> Iterator[Make]:
    with ExitStack() as stack:
        yield lambda kind, *names: Pair(hosted, stack, kind, tmp_path, names)


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("kind", KINDS)
def test_guest_goes_before_its_memory_and_is_whole(pair: Make, kind: str, preempt: bool) -> None:
    moving = pair(kind, *(["postcopy-preempt"] if preempt else []))
    moving.source.set_parameters({"max-postcopy-bandwidth": MIB // 4})
    moving.begin()
    moving.source.start_postcopy()
    wait_until(lambda: moving.source.query().get("ram", {}).get("postcopy-requests", 0) > 9, LONG)
    moving.source.set_parameters({"max-postcopy-bandwidth": 0})
    moving.is_whole()
    assert moving.statuses == ["setup", "active", "postcopy-active", "completed"]
    ram = moving.source.query()["ram"]
    assert ram["postcopy-bytes"] > MIB
    assert ram["remaining"] == 0


def test_memory_that_was_never_used_stays_so(pair: Make) -> None:
    moving = pair("unicorn")
    ram = moving.here.machine.memory["ram"]
    before = int((ram.populated() != 0).sum())
    assert before < ram.pages * 3 // 4
    moving.source.set_parameters({"max-postcopy-bandwidth": 0})
    moving.begin()
    moving.source.start_postcopy()
    moving.is_whole()
    assert int((ram.populated() != 0).sum()) <= before + 64


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_again_comes_again(pair: Make, kind: str) -> None:
    """Behind some rounds most of memory is there, and some of it out of date."""
    moving = pair(kind)
    moving.source.set_parameters({"max-bandwidth": 256 * MIB, "downtime-limit": 0})
    moving.begin()
    wait_until(lambda: moving.source.query()["ram"]["dirty-sync-count"] > 3, LONG)
    moving.source.start_postcopy()
    moving.is_whole()


def test_precopy_that_does_not_end_goes_on_as_postcopy(pair: Make) -> None:
    moving = pair("unicorn")
    moving.source.set_parameters(
        {
            "max-bandwidth": 4 * MIB,
            "downtime-limit": 0,
            "x-vmferry-stall-policy": "postcopy",
            "x-vmferry-stall-rounds": 2,
            "x-vmferry-stall-seconds": 0.1,
        }
    )
    moving.begin()
    moving.is_whole()
    assert "postcopy-active" in moving.statuses


def test_capability_without_need_changes_nothing(pair: Make) -> None:
    moving = pair("unicorn")
    moving.source.set_parameters({"max-bandwidth": 0, "downtime-limit": 2000})
    moving.begin()
    moving.is_whole()
    assert "postcopy-active" not in moving.statuses


@pytest.mark.parametrize("preempt", [False, True], ids=["one-channel", "preempt"])
@pytest.mark.parametrize("kind", KINDS)
def test_lost_connections_are_taken_up(pair: Make, kind: str, preempt: bool) -> None:
    moving = pair(kind, *(["postcopy-preempt"] if preempt else []))
    moving.begin()
    moving.source.start_postcopy()
    chance = random.Random(5)  # noqa: S311 - nothing secret
    for _ in range(4):
        wait_until(lambda: moving.source.status is Status.POSTCOPY_ACTIVE, LONG)
        sent = moving.source.query()["ram"]["normal"]
        enough = sent + chance.randrange(1, 400)
        wait_until(lambda: moving.source.query()["ram"]["normal"] >= enough, LONG)  # noqa: B023
        moving.cut()
        wait_until(lambda: moving.source.status is Status.POSTCOPY_PAUSED, LONG)
        wait_until(lambda: moving.destination.status is Status.POSTCOPY_PAUSED, LONG)
        moving.recover()
        wait_until(lambda: moving.source.status is not Status.POSTCOPY_PAUSED, LONG)
    moving.is_whole()
    cycle = ["postcopy-active", "postcopy-paused", "postcopy-recover"]
    assert moving.statuses == ["setup", "active", *cycle * 4, "postcopy-active", "completed"]


def test_source_without_the_capability_cannot_switch(pair: Make) -> None:
    moving = pair("unicorn")
    moving.source.set_capabilities({"postcopy-ram": False})
    moving.begin()
    with pytest.raises(UsageError, match="postcopy-ram"):
        moving.source.start_postcopy()
    moving.source.cancel()
    moving.source.wait(LONG)
    moving.stays()


def test_postcopy_needs_a_migration(pair: Make) -> None:
    moving = pair("unicorn")
    with pytest.raises(UsageError, match="begun"):
        moving.source.start_postcopy()
    with pytest.raises(UsageError, match="none, not postcopy-paused"):
        moving.source.resume("unix:/nowhere")


def test_cancel_is_too_late_once_it_has_gone(pair: Make) -> None:
    moving = pair("unicorn")
    moving.begin()
    moving.source.start_postcopy()
    wait_until(lambda: moving.source.status is Status.POSTCOPY_ACTIVE, LONG)
    moving.source.cancel()
    assert moving.source.status is Status.POSTCOPY_ACTIVE
    moving.is_whole()


def test_multifd_is_refused_with_it(pair: Make) -> None:
    moving = pair("unicorn", "multifd")
    with pytest.raises(UsageError, match="multifd"):
        moving.source.migrate("unix:/nowhere")
