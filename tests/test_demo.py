"""The demonstration: it moves a machine, and would see what is wrong with it."""

from __future__ import annotations

import pytest

from tests.machines.hosted import KINDS
from vmferry.demo import Moment, Moved, demonstrate, unbroken
from vmferry.errors import MachineError, UsageError
from vmferry.machines import MachineConfig
from vmferry.memory import faults

RAM = 16 << 20
NO_FAULTS = faults.missing(kernel=True)


@pytest.mark.parametrize("kind", KINDS)
def test_machine_moves_and_is_intact(kind: str) -> None:
    told: list[MachineConfig | Moved] = []
    seen: list[Moment] = []
    proof = demonstrate(ram=RAM, moves=2, kind=kind, told=told.append, seen=seen.append)
    machine, first, second = told
    assert isinstance(machine, MachineConfig)
    assert isinstance(first, Moved)
    assert isinstance(second, Moved)
    assert machine.kind == kind
    assert (first.number, second.number) == (1, 2)
    assert first.destination == second.source
    assert len({first.source, second.source, second.destination}) == 3
    assert proof.downtimes == (first.stood_still, second.stood_still)
    assert all(seconds > 0 for seconds in proof.downtimes)
    assert proof.pages == RAM // 4096
    assert proof.checked > 0
    assert proof.heartbeats >= 4
    assert [moment.number for moment in seen] == sorted(moment.number for moment in seen)
    heard = {(side.pid, side.state) for moment in seen for side in moment.sides}
    assert {(first.source, "has moved away"), (first.destination, "runs")} <= heard


def test_machine_with_a_disk_keeps_its_journal() -> None:
    proof = demonstrate(ram=RAM, moves=2, disk=True)
    assert proof.records is not None
    assert 0 < proof.records <= proof.heartbeats


@pytest.mark.skipif(NO_FAULTS is not None, reason=str(NO_FAULTS))
@pytest.mark.parametrize("kind", KINDS)
def test_machine_goes_before_its_memory(kind: str) -> None:
    seen: list[Moment] = []
    moved: list[MachineConfig | Moved] = []
    proof = demonstrate(
        ram=4 * RAM, moves=2, kind=kind, postcopy=True, told=moved.append, seen=seen.append
    )
    assert len(proof.downtimes) == 2
    followed = [moment for moment in seen if moment.migration.is_postcopy]
    assert {moment.number for moment in followed} == {1, 2}
    assert followed[-1].sides[1].state == "runs without all of it"
    for move in moved[1:]:
        assert isinstance(move, Moved)
        assert move.migration.requests > 0
        assert move.migration.service_time is not None


def test_it_takes_a_move() -> None:
    with pytest.raises(UsageError, match="one move or more"):
        demonstrate(moves=0)


def beat(time: int, hot: int = 0, cold: int = 0, tag: str = "H") -> bytes:
    return f"{tag} {time:016x} {time + 5:016x} {hot:016x} {cold:016x}\n".encode()


def test_heartbeats_of_two_processes_are_one_row() -> None:
    said = beat(1, tag="F") + beat(2, 3, 1) + beat(3, 3, 2)
    for cut in range(len(said)):
        beats = unbroken(said[:cut] + said[cut:] + beat(4, 9, 9)[:-9])
        assert [beat.time for beat in beats] == [1, 2, 3]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (beat(1) + beat(2)[7:], "line 2 of the guest is not whole"),
        (beat(1)[:-9] + beat(2), "line 1 of the guest is not whole"),
        (beat(2) + beat(2), "heartbeat 2 goes back"),
        (beat(1, hot=2) + beat(2, hot=1), "heartbeat 2 goes back"),
        (beat(1, cold=2) + beat(2, cold=1), "heartbeat 2 goes back"),
        (beat(1) + beat(2, tag="F"), "heartbeat 2 goes back"),
        (beat(1) + b"E" + b" %016x" % 3 * 5 + b"\n", "the guest found an error"),
    ],
)
def test_row_that_breaks_is_seen(said: bytes, words: str) -> None:
    with pytest.raises(MachineError, match=words):
        unbroken(said)
