"""The tables of statuses keep their laws, and a track goes along them only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.migration.peers import Peer, unanswered
from tests.migration.races import at_once
from vmferry.errors import UsageError
from vmferry.migration.status import (
    DESTINATION,
    ENDS,
    SOURCE,
    UNDER_WAY,
    Status,
    StatusTrack,
    Table,
)
from vmferry.qemu import QemuProcess, QmpError

TABLES = pytest.mark.parametrize("table", [SOURCE, DESTINATION], ids=["source", "destination"])
POSTCOPY = {Status.POSTCOPY_ACTIVE, Status.POSTCOPY_PAUSED, Status.POSTCOPY_RECOVER}


def reachable(table: Table, start: Status) -> set[Status]:
    found, todo = {start}, [start]
    while todo:
        new = table[todo.pop()] - found
        found |= new
        todo += new
    return found


@TABLES
def test_tables_are_closed_and_leave_nothing_unreached(table: Table) -> None:
    assert reachable(table, Status.NONE) == table.keys()


@TABLES
def test_postcopy_is_paused_and_goes_on_as_often_as_may_be(table: Table) -> None:
    active, paused, recover = (
        Status.POSTCOPY_ACTIVE,
        Status.POSTCOPY_PAUSED,
        Status.POSTCOPY_RECOVER,
    )
    assert paused in table[active]
    assert table[paused] == {recover, Status.FAILED}
    assert table[recover] == {active, paused, Status.FAILED}
    # What came before the machine ran is not come back to.
    assert not table[active] & {Status.SETUP, Status.ACTIVE}


@TABLES
def test_every_migration_begins_with_setup(table: Table) -> None:
    assert table[Status.NONE] == {Status.SETUP}
    ends = ENDS & table.keys()
    again = {Status.SETUP} if table is SOURCE else set()
    assert all(table[end] == again for end in ends)


@TABLES
def test_an_end_is_always_within_reach(table: Table) -> None:
    for status in UNDER_WAY & table.keys():
        assert Status.FAILED in table[status] or status is Status.CANCELLING
        assert reachable(table, status) & ENDS


def test_source_can_be_cancelled_while_under_way_only() -> None:
    for status, may_follow in SOURCE.items():
        cancellable = status in UNDER_WAY - POSTCOPY - {Status.CANCELLING}
        assert (Status.CANCELLING in may_follow) == cancellable
    assert SOURCE[Status.CANCELLING] == {Status.CANCELLED}


def test_destination_is_never_cancelled() -> None:
    assert not {Status.CANCELLING, Status.CANCELLED} & DESTINATION.keys()


@given(table=st.sampled_from([SOURCE, DESTINATION]), asked=st.lists(st.sampled_from(Status)))
def test_track_follows_its_table(table: Table, asked: list[Status]) -> None:
    told: list[Status] = []
    track = StatusTrack(table, told.append)
    expected = [Status.NONE]
    for to in asked:
        if to in table[expected[-1]]:
            track.move(to)
            expected.append(to)
        else:
            with pytest.raises(UsageError, match=rf"^behind {expected[-1]} comes .*, not {to}$"):
                track.move(to)
        assert track.current is expected[-1]
    assert told == expected[1:]


def test_refusal_says_what_may_come() -> None:
    with pytest.raises(UsageError) as caught:
        StatusTrack(SOURCE).move(Status.ACTIVE)
    assert str(caught.value) == "behind none comes setup, not active"
    track = StatusTrack(DESTINATION)
    for status in (Status.SETUP, Status.FAILED):
        track.move(status)
    with pytest.raises(UsageError, match="behind failed comes nothing, not setup"):
        track.move(Status.SETUP)


def test_move_if_only_from_there() -> None:
    track = StatusTrack(SOURCE)
    assert not track.move_if(Status.ACTIVE, Status.CANCELLING)
    assert track.move_if(Status.NONE, Status.SETUP)
    with pytest.raises(UsageError):
        track.move_if(Status.SETUP, Status.COMPLETED)
    assert track.current is Status.SETUP


def test_cancelled_or_completed_but_not_both() -> None:
    for _ in range(200):
        told: list[Status] = []
        track = StatusTrack(SOURCE, told.append)
        track.move(Status.SETUP)
        track.move(Status.ACTIVE)
        won = at_once(
            partial(track.move_if, Status.ACTIVE, Status.CANCELLING),
            partial(track.move_if, Status.ACTIVE, Status.COMPLETED),
        )
        assert sorted(won) == [False, True]
        assert told[2:] == [Status.CANCELLING if won[0] else Status.COMPLETED]


def test_listener_hears_in_order_whoever_moves() -> None:
    """Each thread waits for its turn by asking the track itself; no order but the table's fits."""
    told: list[Status] = []
    track = StatusTrack(SOURCE, lambda status: told.append(status) or track.current)
    path = [Status.SETUP, Status.ACTIVE, Status.PRE_SWITCHOVER, Status.DEVICE, Status.COMPLETED]

    def when_due(before: Status, to: Status) -> None:
        while not track.move_if(before, to):
            pass

    at_once(*(partial(when_due, *step) for step in zip([Status.NONE, *path], path, strict=False)))
    assert told == path


# Against the real one

MACHINE = ("-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "8")
SLOW = {"max-bandwidth": 10_000}


class Followed:
    """A QEMU whose statuses are followed along *table*."""

    def __init__(self, vm: QemuProcess, table: Table) -> None:
        self.vm = vm
        self._track = StatusTrack(table)

    def goes(self, *path: str, perhaps: str = "") -> None:
        """Wait for these statuses; each has to be a step of the table.

        *perhaps* is one that may come before them.
        """
        for status in path:
            found = self._next()
            if found == perhaps:
                found = self._next()
            assert found == status

    def _next(self) -> str:
        event = self.vm.qmp.wait_event("MIGRATION", timeout=60.0)
        status = str(event["data"]["status"])
        self._track.move(Status(status))
        return status


@pytest.fixture
def source(start_qemu: Callable[..., QemuProcess]) -> Followed:
    vm = start_qemu(*MACHINE)
    vm.prepare_migration(["events", "return-path", "pause-before-switchover"])
    return Followed(vm, SOURCE)


@pytest.mark.qemu
def test_qemu_fails_to_connect_and_is_cancelled(source: Followed, tmp_path: Path) -> None:
    with contextlib.suppress(QmpError):
        source.vm.migrate(f"unix:{tmp_path / 'nobody'}")
    source.goes("setup", "failed")
    with Peer(tmp_path / "peer") as peer:
        source.vm.migrate(peer.uri, parameters=SLOW)
        source.goes("setup", "active")
        source.vm.execute("migrate_cancel")
        source.goes("cancelling", "cancelled")


@pytest.mark.qemu
def test_qemu_is_cancelled_while_it_waits(source: Followed, tmp_path: Path) -> None:
    with Peer(tmp_path / "peer") as peer:
        source.vm.migrate(peer.uri)
        source.goes("setup", "active", "pre-switchover")
        source.vm.execute("migrate_cancel")
        # It wakes the thread that waits before it sets the status: that one may be quicker.
        source.goes("cancelling", "cancelled", perhaps="device")


@pytest.mark.qemu
def test_qemu_is_cancelled_before_it_is_connected(source: Followed) -> None:
    with unanswered() as uri:
        source.vm.migrate(uri)
        source.goes("setup")
        source.vm.execute("migrate_cancel")
        source.goes("cancelling")


@pytest.mark.qemu
def test_qemu_loses_its_destination(source: Followed, tmp_path: Path) -> None:
    with Peer(tmp_path / "peer") as peer:
        source.vm.migrate(peer.uri)
        source.goes("setup", "active", "pre-switchover")
        source.vm.execute("migrate-continue", {"state": "pre-switchover"})
        source.goes("device")
        peer.hang_up()
        source.goes("failed")


@pytest.mark.qemu
def test_qemu_moves_to_another(
    source: Followed, start_qemu: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    there = Followed(start_qemu(*MACHINE, "-incoming", "defer"), DESTINATION)
    there.vm.incoming(f"unix:{tmp_path / 'there'}", capabilities=["events"])
    source.vm.migrate(f"unix:{tmp_path / 'there'}")
    source.goes("setup", "active", "pre-switchover")
    source.vm.execute("migrate-continue", {"state": "pre-switchover"})
    source.goes("device", "completed")
    there.goes("setup", "active", "completed")
