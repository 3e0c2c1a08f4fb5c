"""A process dies, freezes or fails at a named point of a move whose memory comes later.

The processor of the machine is a thread in Python: when it misses a page it holds the interpreter
lock of its process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.migration.hosted import Hosted
from tests.migration.python_machine import PythonMachine
from tests.migration.relay import Relay
from tests.transports.support import wait_until
from vmferry import TransportError, UsageError
from vmferry.memory import faults
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.qemu.qmp import QmpError
from vmferry.wire.return_path import Shut

NO_FAULTS = faults.missing(kernel=False)
pytestmark = pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))

BEFORE_GO = ["stopped", "discards-sent", "package-sent", "loaded-heard", "ready-heard"]
POSTCOPY = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
SLOW = {"max_bandwidth": 1 << 20, "max_postcopy_bandwidth": 1 << 20}
SHORT = {"x_vmferry_answer_deadline": 2.0, "x_vmferry_idle_deadline": 2.0}


class Pair:
    def __init__(self, stack: ExitStack, path: Path) -> None:
        self._stack = stack
        self._path = path

    def begin(
        self,
        *,
        source: str = "",
        destination: str = "",
        relayed: bool = False,
        cut_at: bytes | None = None,
        **parameters: object,
    ) -> tuple[Hosted, Hosted]:
        """Begin to move a machine; *source* and *destination* are what is to go wrong there.

        *relayed*: over a connection that can be cut, or is at the words *cut_at*.
        """
        there, uri = self.listen(destination, cut_at, **parameters)
        here = self._stack.enter_context(Hosted(self._path / "here", "source", fault=source))
        here.qmp.execute("migrate-set-capabilities", POSTCOPY)
        here.set(**(SLOW | parameters))
        here.qmp.execute("migrate", {"uri": self.relay.address if relayed else uri})
        with suppress(TransportError, QmpError):  # it may die before, or have failed by now
            here.qmp.execute("migrate-start-postcopy")
        return here, there

    def listen(
        self, fault: str = "", cut_at: bytes | None = None, **parameters: object
    ) -> tuple[Hosted, str]:
        """A destination that waits, and where; :attr:`relay` leads there as well."""
        there = self._stack.enter_context(Hosted(self._path / "there", "destination", fault=fault))
        there.qmp.execute("migrate-set-capabilities", POSTCOPY)
        there.set(**parameters)
        uri = f"unix:{self._path}/channel"
        there.qmp.execute("migrate-incoming", {"uri": uri})
        self.relay = self._stack.enter_context(
            Relay(f"unix:{self._path}/relay", uri, trigger=cut_at)
        )
        return there, uri

    def recover(self, here: Hosted, there: Hosted) -> None:
        uri = f"unix:{self._path}/again"
        there.qmp.execute("migrate-recover", {"uri": uri})
        here.qmp.execute("migrate", {"uri": uri, "resume": True})


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack, tmp_path)


def test_nothing_goes_wrong(pair: Pair) -> None:
    source, destination = pair.begin()
    source.wait_for("completed")
    destination.wait_for("completed")
    destination.runs_on()
    assert source.run_state == "postmigrate"


@pytest.mark.parametrize("point", BEFORE_GO)
def test_source_that_dies_before_go_leaves_nothing_that_runs(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:kill")
    source.wait_death()
    destination.wait_for("failed", "postcopy-paused")
    assert destination.run_state == "inmigrate"


@pytest.mark.parametrize("point", BEFORE_GO)
def test_source_that_fails_before_go_goes_on(pair: Pair, point: str) -> None:
    source, destination = pair.begin(source=f"{point}:fail")
    source.wait_for("failed")
    source.runs_on()
    destination.wait_for("failed", "postcopy-paused")
    assert destination.run_state == "inmigrate"


@pytest.mark.parametrize("point", ["memory-known", "loaded", "ready-said", "go-heard"])
@pytest.mark.parametrize("action", ["kill", "fail"])
def test_destination_lost_before_it_took_the_machine_leaves_it(
    pair: Pair, point: str, action: str
) -> None:
    source, destination = pair.begin(destination=f"{point}:{action}")
    if action == "kill":
        destination.wait_death()
    source.wait_for("failed")
    source.runs_on()
    if action == "fail":
        destination.wait_for("failed")
        assert destination.run_state == "inmigrate"


def test_destination_that_refuses_what_is_given_already_leaves_it(pair: Pair) -> None:
    source, destination = pair.begin(source="ready-heard:stop")
    source.wait_frozen()
    destination.qmp.execute("x-drop")
    destination.wait_for("failed")
    source.thaw()  # it says go, and hears the refusal then
    source.wait_for("failed")
    source.runs_on()


def test_destination_that_dies_with_the_machine_takes_it_along(pair: Pair) -> None:
    source, destination = pair.begin(destination="running:kill")
    destination.wait_death()
    source.wait_for("postcopy-paused")
    assert source.run_state == "finish-migrate"


def test_destination_frozen_behind_go_goes_on_where_it_was(pair: Pair) -> None:
    source, destination = pair.begin(destination="running:stop", **SHORT)
    destination.wait_frozen()
    assert source.run_state != "running"
    destination.thaw()
    source.wait_for("completed", "postcopy-paused")
    if source.query()["status"] == "postcopy-paused":
        destination.wait_for("postcopy-paused")
        pair.recover(source, destination)
    source.wait_for("completed")
    destination.wait_for("completed")
    destination.runs_on()


def test_source_that_missed_the_last_word_hears_it_again(pair: Pair) -> None:
    source, destination = pair.begin(relayed=True, cut_at=Shut(0).encode())
    source.wait_for("postcopy-paused")
    destination.wait_for("completed")
    pair.recover(source, destination)
    source.wait_for("completed")
    destination.runs_on()


def test_failure_while_it_is_taken_up_again_is_another_pause(pair: Pair) -> None:
    source, destination = pair.begin(
        source="reconnected:fail", relayed=True, max_postcopy_bandwidth=100_000
    )
    source.wait_for("postcopy-active")
    # All that it writes has come: else it would hold the lock that its monitor needs.
    before = destination.qmp.execute("x-steps")
    wait_until(lambda: destination.qmp.execute("x-steps") > before)
    pair.relay.cut()
    source.wait_for("postcopy-paused")
    destination.wait_for("postcopy-paused")
    pair.recover(source, destination)
    wait_until(lambda: "reconnected" in source.query().get("error-desc", ""))
    assert source.query()["status"] == "postcopy-paused"


def test_one_recovery_at_a_time(pair: Pair, tmp_path: Path) -> None:
    """What comes second would be tried when the first has failed, whoever listens there then."""
    refused: list[str] = []

    def told(name: str, data: dict[str, Any]) -> None:
        if (name, data.get("status")) == ("MIGRATION", "postcopy-paused") and not refused:
            control.resume(f"unix:{tmp_path}/nobody")
            try:
                control.resume(f"unix:{tmp_path}/nobody")
            except UsageError as error:
                refused.append(str(error))

    with PythonMachine() as machine:
        control = Control(machine, notify=told)
        control.set_capabilities({"postcopy-ram": True, "events": True})
        control.set_parameters({"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 17})
        machine.fill().resume()
        pair.listen()
        control.migrate(pair.relay.address)
        control.start_postcopy()
        wait_until(lambda: control.status == Status.POSTCOPY_ACTIVE)
        pair.relay.cut()
        wait_until(lambda: bool(refused))
        wait_until(lambda: control.status == Status.POSTCOPY_PAUSED)
        control.close()
    assert "postcopy-recover" in refused[0]
