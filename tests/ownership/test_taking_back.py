"""Each side dies, or freezes, where the machine is offered, taken back, or given back."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.runs_of_vmferry import LONG
from tests.ownership.etcd import Etcd
from tests.ownership.pairs import Pair, the_one_that_runs
from tests.transports.support import wait_until
from vmferry.ownership.record import Phase

TERM = 4

OFFERED_OR_TAKEN_BACK = ["offer-asked", "revoke-asked", "revoke-landed"]
GIVEN_BACK = ["return-asked", "return-landed"]


@pytest.fixture
def pair(tmp_path: Path, pairs: ExitStack) -> Pair:
    return Pair(pairs, tmp_path, f"file:{tmp_path}/owner")


@pytest.fixture
def leased(tmp_path: Path, etcd: Etcd, pairs: ExitStack) -> Pair:
    return Pair(pairs, tmp_path, etcd.uri(tmp_path.name, term=TERM))


def failing(point: str) -> dict[str, str]:
    """Where the source has its machine back, its destination has failed."""
    return {} if point == "offer-asked" else {"destination": "loaded:fail"}


@pytest.mark.parametrize("point", OFFERED_OR_TAKEN_BACK)
def test_source_that_dies_leaves_a_machine_that_starts(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:kill", **failing(point))
    source.wait_death()
    destination.wait_end()
    pair.starts_anew()
    pair.goes_on()


@pytest.mark.parametrize("point", OFFERED_OR_TAKEN_BACK)
def test_source_that_wakes_late_goes_on(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:stop", **failing(point))
    source.wait_frozen()
    assert not source.has_disk
    source.thaw()
    wait_until(lambda: source.status() in {"completed", "failed"}, LONG)
    one = the_one_that_runs(source, destination)
    assert point == "offer-asked" or one is source
    pair.goes_on()


@pytest.mark.parametrize("point", OFFERED_OR_TAKEN_BACK)
def test_source_that_wakes_behind_its_lease_has_lost(leased: Pair, point: str) -> None:
    source, destination = leased.begin(source=f"{point}:stop", **failing(point))
    source.wait_frozen()
    again = leased.starts_anew()
    source.thaw()
    wait_until(lambda: source.ownership == "gone", LONG)
    wait_until(lambda: source.status() in {"completed", "failed"}, LONG)
    assert source.run_state == "postmigrate"
    assert not source.has_disk
    assert the_one_that_runs(again, source, destination) is again
    leased.goes_on()


@pytest.mark.parametrize("point", GIVEN_BACK)
def test_destination_that_dies_as_it_gives_back_has_given_it(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:kill", fails=True)
    destination.wait_death()
    assert the_one_that_runs(source) is source
    pair.goes_on()
    assert pair.phase is Phase.HELD


@pytest.mark.parametrize("point", GIVEN_BACK)
def test_destination_that_wakes_late_gives_it_back(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:stop", fails=True)
    destination.wait_frozen()
    if point == "return-asked":
        wait_until(lambda: "taken" in source.query().get("x-vmferry-doubt", ""), LONG)
        assert source.run_state == "finish-migrate"
    destination.thaw()
    destination.wait_end()
    assert the_one_that_runs(source) is source
    pair.goes_on()


@pytest.mark.parametrize("point", GIVEN_BACK)
def test_destination_that_wakes_behind_its_lease_touches_nothing(leased: Pair, point: str) -> None:
    source, destination = leased.begin(destination=f"{point}:stop", fails=True)
    destination.wait_frozen()
    assert the_one_that_runs(source) is source
    destination.thaw()
    destination.wait_end()
    assert the_one_that_runs(source) is source
    leased.goes_on()


@pytest.mark.parametrize("point", GIVEN_BACK)
def test_source_that_dies_while_it_is_given_back_leaves_a_machine_that_starts(
    pair: Pair, point: str
) -> None:
    source, destination = pair.begin(destination=f"{point}:stop", fails=True)
    destination.wait_frozen()
    source.kill()
    destination.thaw()
    destination.wait_end()
    pair.starts_anew()
    pair.goes_on()
