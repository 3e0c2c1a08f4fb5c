"""The source of a machine that runs, and destinations that say what they must not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.peers import Peer
from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry.migration.control import Control
from vmferry.migration.status import Status
from vmferry.wire.reader import Tolerate
from vmferry.wire.return_path import Pong, Shut

LONG = 30.0


@pytest.fixture
def source() -> Iterator[Control]:
    """A machine that runs, and may go before its memory."""
    with ExitStack() as stack:
        machine = stack.enter_context(PythonMachine())
        control = Control(machine)
        stack.callback(control.close)
        control.set_capabilities({"postcopy-ram": True})
        machine.memory.add("unused", 8 << 20)
        machine.fill().resume()
        yield control


def test_destination_that_has_the_machine_before_it_was_sent(
    source: Control, tmp_path: Path
) -> None:
    with Peer(tmp_path / "socket") as peer:
        source.migrate(peer.uri)
        source.start_postcopy()
        peer.say(Shut(0).encode() + Pong(2).encode())
        assert source.wait(LONG) == Status.FAILED
    assert "was not sent yet" in str(source.error)
    assert source.machine.running
    wait_until(lambda: source.run_state == "running")


def test_what_is_left_is_told(source: Control, tmp_path: Path) -> None:
    """Of what is not sent because it is zero, nothing is left either."""
    source.set_parameters({"max-bandwidth": 1 << 20, "max-postcopy-bandwidth": 1 << 20})
    with Peer(tmp_path / "socket", Tolerate.NO_END) as peer:
        source.migrate(peer.uri)
        source.start_postcopy()
        while source.run_state == "running":  # it forgets, as often as there is more to forget
            peer.say(Pong(2).encode())
            time.sleep(0.01)
        peer.say(Pong(3).encode())
        wait_until(lambda: source.status == Status.POSTCOPY_ACTIVE)
        before = ram(source)
        assert before["remaining"] > 0
        wait_until(lambda: ram(source)["remaining"] == 0)
        assert ram(source)["postcopy-bytes"] > before["postcopy-bytes"]
        assert source.status == Status.POSTCOPY_ACTIVE
        peer.confirm()
        assert source.wait(LONG) == Status.COMPLETED


def ram(control: Control) -> dict[str, int]:
    found = control.query()["ram"]
    assert isinstance(found, dict)
    return found
