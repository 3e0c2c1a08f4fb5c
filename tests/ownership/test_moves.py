"""A process dies or freezes at each change of the record: the machine runs on one side, or none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.migration.hosted import Hosted
from tests.ownership.etcd import Etcd
from tests.transports.support import wait_until
from vmferry import TransportError
from vmferry.ownership.record import Phase
from vmferry.ownership.store import open_store

SHORT = {"x_vmferry_answer_deadline": 2.0, "x_vmferry_idle_deadline": 2.0}


class Pair:
    def __init__(self, stack: ExitStack, path: Path, store: str) -> None:
        self._stack, self._path = stack, path
        self.store = open_store(store)

    def begin(
        self, *, source: str = "", destination: str = "", postcopy: bool = False
    ) -> tuple[Hosted, Hosted]:
        start = self._stack.enter_context
        uri = self.store.uri
        here = start(Hosted(self._path / "here", "source", fault=source, store=uri))
        there = start(Hosted(self._path / "there", "destination", fault=destination, store=uri))
        channel = f"unix:{self._path}/channel"
        here.set(max_bandwidth=0, **SHORT)
        there.set(**SHORT)
        if postcopy:
            states = [{"capability": "postcopy-ram", "state": True}]
            for side in (here, there):
                side.qmp.execute("migrate-set-capabilities", {"capabilities": states})
            here.set(max_bandwidth=1 << 20)
        there.qmp.execute("migrate-incoming", {"uri": channel})
        with suppress(TransportError):  # it may die before it has answered
            here.qmp.execute("migrate", {"uri": channel})
        return here, there

    @property
    def phase(self) -> Phase:
        record = self.store.read().record
        assert record is not None
        return record.phase


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, tmp_path, f"file:{tmp_path}/owner")


@pytest.fixture
def leased(tmp_path: Path, etcd: Etcd) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, tmp_path, etcd.uri(tmp_path.name, term=4))


def test_machine_moves(pair: Pair) -> None:
    source, destination = pair.begin()
    source.wait_for("completed")
    destination.runs_on()
    assert source.query()["x-vmferry-ownership"] == "gone"
    assert destination.query()["x-vmferry-ownership"] == "running"
    record = pair.store.read().record
    assert record is not None
    assert [entry.act for entry in record.history] == ["claim", "offer", "grant", "take", "start"]


def test_machine_moves_before_its_memory(pair: Pair) -> None:
    source, destination = pair.begin(postcopy=True)
    source.wait_for("active")
    source.qmp.execute("migrate-start-postcopy")
    source.wait_for("completed")
    destination.wait_for("completed")
    destination.runs_on()
    record = pair.store.read().record
    assert record is not None
    assert [entry.act for entry in record.history] == ["claim", "offer", "grant", "take", "start"]


def test_destination_that_dies_as_it_loads_leaves_the_machine_and_its_memory(pair: Pair) -> None:
    source, destination = pair.begin(destination="loaded:kill", postcopy=True)
    source.wait_for("active")
    source.qmp.execute("migrate-start-postcopy")
    destination.wait_death()
    source.wait_for("failed")
    source.runs_on()
    assert pair.phase is Phase.HELD


@pytest.mark.parametrize("point", ["offer-landed", "grant-asked", "grant-landed", "go-said"])
def test_source_that_dies_leaves_the_machine_to_who_has_it(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:kill")
    source.wait_death()
    if point == "offer-landed":  # the last state was not sent
        destination.wait_for("failed")
        assert destination.run_state != "running"
        return
    destination.wait_for("completed")
    destination.runs_on()


@pytest.mark.parametrize("point", ["ready-said", "take-asked", "take-landed", "start-asked"])
def test_destination_that_dies_before_it_has_started_leaves_the_machine(
    pair: Pair, point: str
) -> None:
    source, destination = pair.begin(destination=f"{point}:kill")
    destination.wait_death()
    source.wait_for("failed")
    source.runs_on()
    assert pair.phase is Phase.HELD


def test_destination_that_dies_when_it_has_started_takes_the_machine_along(pair: Pair) -> None:
    source, destination = pair.begin(destination="start-landed:kill")
    destination.wait_death()
    source.wait_for("completed")
    assert source.run_state == "postmigrate"


@pytest.mark.parametrize("point", ["take-asked", "ready-said"])
def test_destination_frozen_before_it_took_has_lost_the_machine(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:stop")
    destination.wait_frozen()
    source.wait_for("failed")
    source.runs_on()
    destination.thaw()
    destination.wait_for("failed")
    assert destination.run_state != "running"


def test_destination_frozen_when_it_has_taken_keeps_the_machine(pair: Pair) -> None:
    source, destination = pair.begin(destination="take-landed:stop")
    destination.wait_frozen()
    wait_until(lambda: "taken" in source.query().get("x-vmferry-doubt", ""), 30)
    assert source.run_state == "finish-migrate"
    destination.thaw()
    destination.wait_for("completed")
    destination.runs_on()
    source.wait_for("completed")
    assert source.run_state == "postmigrate"


@pytest.mark.parametrize("point", ["offer-asked", "grant-asked", "grant-landed"])
def test_source_frozen_at_a_change_goes_on_or_has_lost(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:stop")
    source.wait_frozen()
    if point == "grant-landed":
        destination.wait_for("completed")
    source.thaw()
    source.wait_for("completed", "failed")
    states = {source.run_state, destination.run_state}
    assert len(states & {"running"}) == 1, states


def test_silent_store_keeps_the_machine_still(leased: Pair, etcd: Etcd) -> None:
    source, destination = leased.begin(source="grant-asked:stop")
    source.wait_frozen()
    with etcd.frozen():
        source.thaw()
        wait_until(lambda: "x-vmferry-doubt" in source.query(), 8)
        assert "running" not in {source.run_state, destination.run_state}
    source.wait_for("completed", "failed")
    states = {source.run_state, destination.run_state}
    assert len(states & {"running"}) == 1, states


def test_owner_that_cannot_renew_stands_still_until_it_can(leased: Pair, etcd: Etcd) -> None:
    uri = etcd.uri("one", term=8)
    with Hosted(Path(f"{leased._path}/one"), "source", store=uri) as one:
        assert one.run_state == "running"
        with etcd.frozen():
            wait_until(lambda: one.run_state == "paused", 8)
            wait_until(lambda: "x-vmferry-doubt" in one.query(), 8)
        one.runs_on()


def test_frozen_owner_ends_before_its_lease_does(leased: Pair) -> None:
    with Hosted(Path(f"{leased._path}/one"), "source", store=leased.store.uri) as one:
        one.freeze()
        began = time.monotonic()
        one.wait_death()
        assert time.monotonic() - began < 4
        record = leased.store.read().record
        assert record is not None
        assert not leased.store.gone(record.owner), "its lease has not ended yet"
