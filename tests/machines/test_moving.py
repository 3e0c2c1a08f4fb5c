"""A hosted machine moves while it runs, between hosts of any kind, and arrives as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machines.hosted import KINDS, MIB, Hosted, Start
from vmferry.migration.control import Control
from vmferry.migration.status import Status

LONG = 60.0
"""Seconds for what takes less than one on a machine that has nothing else to do."""

GUEST = {"ram": 32 * MIB, "working_set": 8 * MIB, "hot": 0.5, "changed": 0.3}


@pytest.fixture
def controls() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def control(guest: Hosted, stack: ExitStack, *capabilities: str) -> Control:
    made = Control(guest.machine, notify=lambda _event, _data: None)
    stack.callback(made.close)
    made.set_parameters({"max-bandwidth": 0})
    made.set_capabilities(dict.fromkeys(capabilities, True))
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other_kind", KINDS)
@pytest.mark.parametrize("capabilities", [[], ["xbzrle"], ["multifd"], ["auto-converge"]])
def test_guest_moves_there_and_back(
    hosted: Start,
    controls: ExitStack,
    tmp_path: Path,
    kind: str,
    other_kind: str,
    capabilities: list[str],
) -> None:
    guest = hosted(kind, rate=5000, cpus=2, **GUEST).run_until_filled()
    source = control(guest, controls, *capabilities)
    for number, arrives in enumerate((other_kind, kind, other_kind)):
        other = hosted(arrives, rate=5000, cpus=2, **GUEST)
        destination = control(other, controls, *capabilities)
        address = destination.incoming(f"unix:{tmp_path}/{number}")
        before = guest.console.wait_beat()
        source.migrate(address)
        assert source.wait(LONG) == Status.COMPLETED, source.query()
        assert destination.wait(LONG) == Status.COMPLETED, destination.query()
        after = other.fresh_beat()
        assert after.time > before.time
        assert after.stood_still(before) > 0
        other.run_on()
        assert other.findings() == []
        assert guest.findings() == []  # what was left behind is of one instant as well
        other.machine.resume()
        guest, source = other, destination


@pytest.mark.parametrize("kind", KINDS)
def test_guest_goes_on_after_a_cancel(
    hosted: Start, controls: ExitStack, tmp_path: Path, kind: str
) -> None:
    guest = hosted(kind, cpus=2, **GUEST).run_until_filled()
    source = control(guest, controls)
    source.set_parameters({"max-bandwidth": 1 << 20})
    for number in itertools.count():
        destination = control(hosted(kind, cpus=2, **GUEST), controls)
        source.migrate(destination.incoming(f"unix:{tmp_path}/{number}"))
        guest.console.wait_beat()
        source.cancel()
        assert source.wait(LONG) == Status.CANCELLED
        if number == 4:
            break
    guest.run_on()
    assert guest.findings() == []
