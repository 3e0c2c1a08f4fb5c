"""A process dies, freezes or fails at a named point: the machine runs on one side at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.migration.hosted import Hosted
from vmferry import TransportError

# What the destination cannot have in full yet is lost with the source, as in any crash.
LOST = ["connected", "round-sent", "stopped", "devices-sent"]
BEQUEATHED = ["offered", "ready-heard", "go-said", "shut-heard"]
BEFORE_IT_RAN = ["memory-known", "pages-stored", "loaded", "ready-said", "go-heard"]
AFTERWARDS = ["shut-said", "running"]


class Pair:
    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self._path = path

    def begin(
        self, *, source: str = "", destination: str = "", owned: bool = False, **parameters: object
    ) -> tuple[Hosted, Hosted]:
        """Begin to move a machine; *source* and *destination* are what is to go wrong there."""
        start = self._stack.enter_context
        store = f"file:{self._path}/owner" if owned else ""
        here = start(Hosted(self._path / "here", "source", fault=source, store=store))
        there = start(Hosted(self._path / "there", "destination", fault=destination, store=store))
        uri = f"unix:{self._path}/channel"
        here.set(max_bandwidth=0, **parameters)
        there.set(**parameters)
        there.qmp.execute("migrate-incoming", {"uri": uri})
        with suppress(TransportError):  # it may die before it has answered
            here.qmp.execute("migrate", {"uri": uri})
        return here, there


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, tmp_path)


@pytest.mark.parametrize("point", LOST)
def test_source_that_dies_early_leaves_nothing_that_runs(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:kill")
    source.wait_death()
    if point == "connected":  # no source yet to the destination, which waits for another
        assert destination.query()["status"] == "setup"
    else:
        assert destination.wait_for("failed") == "failed"
    assert destination.run_state != "running"


@pytest.mark.parametrize("point", BEQUEATHED)
def test_source_that_dies_late_leaves_the_machine_to_the_destination(
    pair: Pair, point: str
) -> None:
    source, destination = pair.begin(source=f"{point}:kill")
    source.wait_death()
    destination.wait_for("completed")
    destination.runs_on()


@pytest.mark.parametrize("point", BEFORE_IT_RAN)
def test_destination_that_dies_leaves_the_machine_to_the_source(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:kill")
    destination.wait_death()
    source.wait_for("failed")
    source.runs_on()


@pytest.mark.parametrize("point", AFTERWARDS)
def test_destination_that_dies_with_the_machine_takes_it_along(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:kill")
    destination.wait_death()
    source.wait_for("completed")
    assert source.run_state == "postmigrate"


@pytest.mark.parametrize("point", [*LOST, "offered", "ready-heard"])
def test_source_that_fails_goes_on(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:fail")
    source.wait_for("failed")
    if point != "connected":
        assert destination.wait_for("failed") == "failed"
    source.runs_on()
    assert destination.run_state != "running"


@pytest.mark.parametrize("point", BEFORE_IT_RAN)
def test_destination_that_fails_leaves_the_machine_to_the_source(pair: Pair, point: str) -> None:
    source, destination = pair.begin(destination=f"{point}:fail")
    source.wait_for("failed")
    destination.wait_for("failed")
    source.runs_on()
    assert point in source.query()["error-desc"]
    assert destination.run_state != "running"


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("point", ["shut-heard", *AFTERWARDS])
def test_failure_behind_the_last_word_leaves_the_machine_at_the_destination(
    pair: Pair, point: str, owned: bool
) -> None:
    if point == "shut-heard":
        source, destination = pair.begin(source=f"{point}:fail", owned=owned)
    else:
        source, destination = pair.begin(destination=f"{point}:fail", owned=owned)
    source.wait_for("completed")
    destination.wait_for("completed")
    assert source.run_state == "postmigrate"
    assert source.query()["downtime"] <= source.query()["total-time"]
    destination.runs_on()
    assert source.run_state == "postmigrate"
    failed = source if point == "shut-heard" else destination
    warning = failed.qmp.wait_event("VMFERRY_WARNING")
    assert point in str(warning)


SHORT = {"x_vmferry_answer_deadline": 2.0, "x_vmferry_idle_deadline": 2.0}


@pytest.mark.parametrize("point", ["memory-known", "loaded"])
def test_destination_frozen_before_it_was_ready_has_lost_the_machine(
    pair: Pair, point: str
) -> None:
    source, destination = pair.begin(destination=f"{point}:stop", **SHORT)
    destination.wait_frozen()
    source.wait_for("failed")
    source.runs_on()
    destination.thaw()
    assert destination.wait_for("failed") == "failed"
    assert destination.run_state != "running"


def test_destination_frozen_when_it_was_ready_still_has_the_machine(pair: Pair) -> None:
    source, destination = pair.begin(destination="ready-said:stop", **SHORT)
    destination.wait_frozen()
    source.wait_for("failed")  # it has said go, and nobody has answered
    assert source.run_state == "postmigrate"
    destination.thaw()
    destination.wait_for("completed")
    destination.runs_on()
    assert source.run_state == "postmigrate"


def test_source_frozen_before_its_last_word_can_still_say_it(pair: Pair) -> None:
    source, destination = pair.begin(source="ready-heard:stop", **SHORT)
    source.wait_frozen()
    assert destination.run_state == "inmigrate"  # in doubt, however long
    source.thaw()
    destination.wait_for("completed")
    destination.runs_on()
    source.wait_for("completed")
    assert source.run_state == "postmigrate"
