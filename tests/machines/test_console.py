"""Lines of the guest, whole and in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transports.support import background
from vmferry.errors import MachineError
from vmferry.machines.guest.console import Console, Heartbeat, Report


def line(tag: str, *numbers: int) -> bytes:
    return (tag + "".join(f" {number:016x}" for number in numbers) + "\n").encode()


@given(st.lists(st.integers(1, 200)), st.integers(1, 5))
def test_lines_come_in_pieces_of_any_size(cuts: list[int], count: int) -> None:
    beats = [Heartbeat(n, n + 5, n + 7, n + 9, filled=n > 2) for n in range(count)]
    data = b"".join(
        line("H" if beat.filled else "F", beat.time, beat.wall, beat.hot, beat.cold)
        for beat in beats
    )
    console = Console()
    for cut in cuts:
        console.feed(data[:cut])
        data = data[cut:]
    console.feed(data)
    assert list(console.beats) == beats
    assert console.count == count


def test_halves_of_lines_and_noise_are_passed_over() -> None:
    console = Console()
    console.feed(b"0000 0000000000000001\n" + line("H", 1, 2, 3) + b"\xff" * 1000)
    console.feed(b"\n" + line("E", 1, 2, 3, 4) + line("H", 1, 2, 3, 4))
    assert list(console.beats) == [Heartbeat(1, 2, 3, 4, filled=True)]
    assert console.reports == []


def test_heartbeats_are_waited_for() -> None:
    console = Console()
    console.feed(line("F", 1, 2, 3, 4))
    waiting = background(console.wait_filled)
    beat = background(console.wait_beat)
    console.feed(line("H", 5, 6, 7, 8))
    while not beat.done():
        console.feed(line("H", 5, 6, 7, 8))
    assert waiting.result(5) == beat.result(5) == Heartbeat(5, 6, 7, 8, filled=True)


def test_report_is_an_error_for_whoever_waits() -> None:
    console = Console()
    console.check()
    console.feed(line("E", 1, 3, 9, 0x20, 0x1F))
    assert console.reports == [Report(1, 3, 9, 0x20, 0x1F)]
    words = "vCPU 1: page 9 is stale: expected 0x20, found 0x1f"
    with pytest.raises(MachineError, match=words):
        console.check()
    with pytest.raises(MachineError, match=words):
        console.wait_beat()


def test_silence_is_an_error_with_what_was_heard_last() -> None:
    console = Console()
    with pytest.raises(MachineError, match=r"silent for 0.01 s; last: nothing"):
        console.wait_filled(0.01)
    console.feed(line("F", 1, 2, 3, 4))
    with pytest.raises(MachineError, match=r"last: Heartbeat\(time=1"):
        console.wait_filled(0.01)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (5, "vCPU 0: there are registers that disagree"),
        (6, "vCPU 0: there are counters that disagree"),
        (9, "vCPU 0: there are wrong in a way of number 9"),
    ],
)
def test_reports_in_words(kind: int, text: str) -> None:
    assert str(Report(0, kind, 0, 1, 2)) == f"{text}: expected 0x1, found 0x2"


def test_time_that_stood_still() -> None:
    before = Heartbeat(100, 1000, 0, 0, filled=True)
    assert Heartbeat(150, 1060, 0, 0, filled=True).stood_still(before) == 10
