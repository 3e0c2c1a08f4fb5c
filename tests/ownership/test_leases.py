"""A lease that is about to end closes the images of whoever has them, or ends its process."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.runs_of_vmferry import LONG
from tests.ownership.etcd import Etcd
from tests.ownership.pairs import Pair, the_one_that_runs
from tests.transports.support import wait_until

TERM = 4
"""Seconds; the delay of a fault point is longer."""


@pytest.fixture
def pair(tmp_path: Path, etcd: Etcd, pairs: ExitStack) -> Pair:
    return Pair(pairs, tmp_path, etcd.uri(tmp_path.name, term=TERM))


@pytest.mark.parametrize("point", ["stopped", "images-inactive"])
def test_source_frozen_before_it_offers_ends_with_its_lease(pair: Pair, point: str) -> None:
    """It could still flush what its images have in caches when it wakes."""
    source, destination = pair.begin(source=f"{point}:stop")
    source.wait_frozen()
    source.wait_death()
    destination.wait_end()
    pair.starts_anew()


def test_source_that_waits_lets_go_of_its_images_where_the_store_is_silent(
    pair: Pair, etcd: Etcd
) -> None:
    source, destination = pair.begin(pauses=True)
    wait_until(lambda: source.status() == "pre-switchover", LONG)
    assert source.has_disk
    with etcd.frozen():
        wait_until(lambda: source.ownership == "lapsed", LONG)
        assert not source.has_disk
    source.qmp.execute("migrate-continue", {"state": "pre-switchover"})
    wait_until(lambda: source.status() == "failed", LONG)
    assert the_one_that_runs(source) is source
    pair.goes_on()
    destination.wait_end()


@pytest.mark.parametrize("point", ["start-asked", "start-landed", "images-active"])
def test_destination_frozen_for_most_of_the_term_runs(
    tmp_path: Path, etcd: Etcd, pairs: ExitStack, point: str
) -> None:
    pair = Pair(pairs, tmp_path, etcd.uri(tmp_path.name, term=2 * TERM))
    source, destination = pair.begin(destination=f"{point}:stop")
    destination.wait_frozen()
    time.sleep(0.65 * 2 * TERM)
    destination.thaw()
    assert the_one_that_runs(source, destination) is destination
    pair.goes_on()
    wait_until(lambda: source.status() == "completed", LONG)


@pytest.mark.parametrize("point", ["start-asked", "start-landed", "go-heard"])
def test_destination_frozen_for_longer_ends(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:stop")
    destination.wait_frozen()
    destination.wait_death()
    if point == "start-asked":  # it has not begun, and the source has all of it
        assert the_one_that_runs(source) is source
        return pair.goes_on()
    wait_until(lambda: source.status() == "completed", LONG)
    pair.starts_anew()
    return None


@pytest.mark.parametrize("point", ["start-asked", "start-landed"])
def test_destination_that_hears_nothing_before_it_runs_closes_its_images(
    pair: Pair, etcd: Etcd, point: str
) -> None:
    """The kernel does not end it: what it has may be all there is."""
    source, destination = pair.begin(destination=f"{point}:stop")
    destination.wait_frozen()
    assert destination.has_disk
    with etcd.frozen():
        destination.thaw()
        wait_until(lambda: not destination.has_disk, LONG)
        wait_until(lambda: "x-vmferry-doubt" in destination.query(), LONG)
        assert destination.ownership in {"returning", "lapsed"}
        time.sleep(TERM)
        assert destination.lives
        assert destination.run_state != "running"
    one = the_one_that_runs(source, destination)
    assert point == "start-asked" or one is destination
    pair.goes_on()
    wait_until(lambda: source.status() in {"completed", "failed"}, LONG)
    assert the_one_that_runs(source, destination) is one


def test_destination_whose_lease_lapses_as_it_starts_runs_when_that_counts_again(
    pair: Pair, etcd: Etcd
) -> None:
    """Its thread is slow, between the word that the machine may run and the vCPUs."""
    source, destination = pair.begin(destination="go-heard:delay")
    wait_until(lambda: destination.ownership == "running", LONG)
    with etcd.frozen():
        wait_until(lambda: destination.status() == "completed", LONG)
        wait_until(lambda: destination.ownership == "lapsed", LONG)
        assert destination.run_state != "running"
        assert not destination.has_disk
    assert the_one_that_runs(source, destination) is destination
    pair.goes_on()


def test_source_whose_lease_lapses_as_it_goes_on_runs_when_that_counts_again(
    pair: Pair, etcd: Etcd
) -> None:
    source, destination = pair.begin(source="back:delay", destination="ready-said:kill")
    destination.wait_death()
    wait_until(lambda: source.ownership == "running", LONG)
    with etcd.frozen():
        wait_until(lambda: source.status() == "failed", LONG)
        wait_until(lambda: source.ownership == "lapsed", LONG)
        assert source.run_state != "running"
        assert not source.has_disk
    assert the_one_that_runs(source) is source
    pair.goes_on()
