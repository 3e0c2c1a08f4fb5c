"""The source of a machine that runs, and destinations that say what they must not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.peers import Peer
from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry.migration.control import Control
from vmferry.migration.status import Status
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
