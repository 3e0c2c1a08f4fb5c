"""The counters of a migration, and that ``query-migrate`` is answered as by a real QEMU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guests import Serial, walker
from tests.migration.peers import Peer, unanswered
from tests.migration.races import at_once
from vmferry.migration.capabilities import Capability
from vmferry.migration.parameters import Parameters, changed
from vmferry.migration.rates import Period
from vmferry.migration.statistics import LiveProgress, Sample, Statistics, query_incoming
from vmferry.migration.status import Status
from vmferry.migration.throttling import Throttling
from vmferry.qemu import QemuProcess

PAGE = 4096
XBZRLE = frozenset({Capability.XBZRLE})
TIMES = {"total-time", "setup-time"}


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Story:
    """A migration of a megabyte, told up to some point."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.statistics = Statistics(clock=self.clock)

    def setup(self) -> Statistics:
        self.statistics.start()
        self.clock.now += 0.25
        self.statistics.synced(1 << 20)
        self.statistics.active(1 << 20, PAGE)
        return self.statistics

    def first_round(self) -> Statistics:
        statistics = self.setup()
        self.clock.now += 1.0
        statistics.count(transferred=150 * PAGE, normal=150, zero=106)
        statistics.sample()
        statistics.synced(10 * PAGE)
        statistics.expect(dirty_rate=10 * PAGE, downtime=10 / 150, throttle=0)
        return statistics

    def end(self) -> Statistics:
        statistics = self.first_round()
        self.clock.now += 0.5
        statistics.stopped()
        statistics.synced(20 * PAGE)
        self.clock.now += 0.0625
        statistics.count(transferred=20 * PAGE, normal=20)
        statistics.finished()
        self.clock.now += 100.0
        return statistics


def test_before_and_in_setup() -> None:
    statistics = Story().statistics
    assert statistics.query(Status.NONE) == {}
    assert statistics.query(Status.SETUP) == {"status": "setup"}


def test_first_round() -> None:
    story = Story()
    statistics = story.setup()
    assert statistics.query(Status.ACTIVE)["ram"]["remaining"] == 1 << 20
    story.clock.now += 1.0
    statistics.count(transferred=50 * PAGE, normal=50, zero=6)
    assert statistics.sample() == Sample(50 * PAGE, 1.0)
    info = statistics.query(Status.ACTIVE)
    assert info.pop("ram") == {
        "transferred": 50 * PAGE,
        "remaining": 200 * PAGE,
        "total": 1 << 20,
        "duplicate": 6,
        "skipped": 0,
        "normal": 50,
        "normal-bytes": 50 * PAGE,
        "dirty-pages-rate": 0,
        "mbps": 50 * PAGE * 8 / 1e6,
        "dirty-sync-count": 1,
        "page-size": PAGE,
        "multifd-bytes": 0,
        "pages-per-second": 56,
        "postcopy-requests": 0,
        "precopy-bytes": 50 * PAGE,
        "downtime-bytes": 0,
        "postcopy-bytes": 0,
        "dirty-sync-missed-zero-copy": 0,
    }
    assert info == {
        "status": "active",
        "total-time": 1250,
        "setup-time": 250,
        "expected-downtime": 300,
    }


def test_next_round() -> None:
    info = Story().first_round().query(Status.ACTIVE)
    assert info["expected-downtime"] == 67
    assert info["ram"]["dirty-pages-rate"] == 10
    assert info["ram"]["remaining"] == 10 * PAGE
    assert info["ram"]["dirty-sync-count"] == 2


def test_end() -> None:
    info = Story().end().query(Status.COMPLETED)
    ram = info.pop("ram")
    assert info == {
        "status": "completed",
        "total-time": 1812,
        "setup-time": 250,
        "downtime": 62,
    }
    assert (ram["remaining"], ram["dirty-pages-rate"], ram["dirty-sync-count"]) == (0, 0, 3)
    assert (ram["precopy-bytes"], ram["downtime-bytes"]) == (150 * PAGE, 20 * PAGE)
    assert ram["mbps"] == pytest.approx(170 * PAGE * 8 / 1e6 / 1.5625)


def test_downtime_runs_while_the_machine_stands_still() -> None:
    story = Story()
    statistics = story.first_round()
    assert statistics.downtime == 0.0
    statistics.stopped()
    story.clock.now += 0.125
    assert statistics.downtime == 0.125


def test_samples_are_a_tenth_of_a_second_apart() -> None:
    story = Story()
    statistics = story.setup()
    statistics.count(transferred=100)
    story.clock.now += 0.0625
    assert statistics.sample() is None
    story.clock.now += 0.0625
    assert statistics.sample() == Sample(100, 0.125)
    assert statistics.sample() is None


def test_failed_says_why_and_nothing_else() -> None:
    statistics = Story().first_round()
    assert statistics.query(Status.FAILED, error="no luck") == {
        "status": "failed",
        "error-desc": "no luck",
    }
    assert statistics.query(Status.FAILED) == {"status": "failed"}
    assert statistics.query(Status.CANCELLED, error="no luck") == {"status": "cancelled"}


def test_xbzrle() -> None:
    story = Story()
    statistics = story.first_round()
    statistics.count(xbzrle_pages=4, xbzrle_bytes=1024, xbzrle_misses=2, normal=5)
    # Differences that are too many count as such, and the page is sent as it is.
    statistics.count(xbzrle_pages=1, xbzrle_bytes=PAGE, xbzrle_overflows=1, normal=1)
    statistics.synced(0)
    parameters = Parameters(xbzrle_cache_size=1 << 20)
    info = statistics.query(Status.ACTIVE, capabilities=XBZRLE, parameters=parameters)
    assert info["xbzrle-cache"] == {
        "cache-size": 1 << 20,
        "bytes": 1024 + PAGE,
        "pages": 5,
        "cache-miss": 2,
        "cache-miss-rate": 0.2,
        "encoding-rate": 4.0,
        "overflow": 1,
    }
    assert "xbzrle-cache" not in statistics.query(Status.ACTIVE)


def test_reports_have_what_a_running_machine_has() -> None:
    told: list[object] = []
    statistics = Statistics(told.append, clock=Clock())
    statistics.synced(1 << 20)
    statistics.active(1 << 20, PAGE)
    statistics.expect(dirty_rate=5.0, downtime=0.5, throttle=30)
    statistics.count(normal=1)
    statistics.tick(force=True)
    last = told[-1]
    assert isinstance(last, LiveProgress)
    assert (last.round, last.remaining) == (1, (1 << 20) - PAGE)
    assert (last.dirty_rate, last.expected_downtime, last.throttle) == (5.0, 0.5, 30)


def test_nothing_is_lost_between_threads() -> None:
    statistics = Story().setup()

    def count() -> None:
        for _ in range(2000):
            statistics.count(transferred=3, multifd=2, normal=1, xbzrle_pages=1)

    def ask() -> None:
        for _ in range(500):
            ram = statistics.query(Status.ACTIVE)["ram"]
            assert ram["transferred"] * 2 == ram["multifd-bytes"] * 3

    at_once(count, count, count, ask)
    counters = statistics.counters()
    assert (counters.transferred, counters.multifd) == (18000, 12000)
    assert (counters.normal, counters.xbzrle_pages) == (6000, 6000)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=20))
def test_remaining_is_never_negative(rounds: list[tuple[int, int]]) -> None:
    statistics = Story().setup()
    for sent, dirty in rounds:
        before = statistics.remaining
        statistics.count(normal=sent)
        assert statistics.remaining == max(before - sent * PAGE, 0)
        statistics.synced(dirty * PAGE)


def test_incoming() -> None:
    address = {"type": "unix", "path": "/x"}
    assert query_incoming(Status.NONE) == {}
    assert query_incoming(Status.SETUP, [address]) == {
        "status": "setup",
        "socket-address": [address],
    }


# Against the real one


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[Status, dict[str, Any]]:
    """What a QEMU with xbzrle, told to pause before the switchover, says in each status."""
    directory = tmp_path_factory.mktemp("statuses")
    answers: dict[Status, dict[str, Any]] = {}
    with QemuProcess(["-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "8", "-S"]) as vm:

        def note(status: Status) -> None:
            answers[status] = vm.wait_migration(status) if status else vm.query_migrate()

        answers[Status.NONE] = vm.query_migrate()
        capabilities = ["xbzrle", "pause-before-switchover", "return-path"]
        vm.prepare_migration(capabilities, {"max-bandwidth": 10_000})
        with unanswered() as uri:
            vm.execute("migrate", {"uri": uri})
            note(Status.SETUP)
            vm.execute("migrate_cancel")
            note(Status.CANCELLING)
    with QemuProcess(["-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "8", "-S"]) as vm:
        vm.prepare_migration(capabilities, {"max-bandwidth": 10_000})
        with contextlib.suppress(Exception):
            vm.execute("migrate", {"uri": f"unix:{directory / 'nobody'}"})
        note(Status.FAILED)
        with Peer(directory / "cancelled") as peer:
            vm.execute("migrate", {"uri": peer.uri})
            note(Status.ACTIVE)
            vm.execute("migrate_cancel")
            note(Status.CANCELLED)
        vm.prepare_migration(parameters={"max-bandwidth": 0})
        with Peer(directory / "completed") as peer:
            vm.execute("migrate", {"uri": peer.uri})
            note(Status.PRE_SWITCHOVER)
            vm.execute("migrate-continue", {"state": "pre-switchover"})
            note(Status.DEVICE)  # until it is answered
            peer.confirm()
            note(Status.COMPLETED)
    return answers


def shape(value: object) -> object:
    """Keys and kinds of values, all the way down; a number is a number, as in JSON."""
    match value:
        case dict():
            return {key: shape(inner) for key, inner in value.items()}
        case list():
            return [shape(inner) for inner in value]
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case _:
            return type(value).__name__


def untyped(info: dict[str, Any]) -> Any:
    return json.loads(json.dumps(info))


@pytest.mark.qemu
@pytest.mark.parametrize(
    ("status", "statistics"),
    [
        (Status.NONE, lambda: Story().statistics),
        (Status.SETUP, lambda: Story().statistics),
        (Status.ACTIVE, lambda: Story().first_round()),
        (Status.PRE_SWITCHOVER, lambda: Story().first_round()),
        (Status.DEVICE, lambda: Story().first_round()),
        (Status.COMPLETED, lambda: Story().end()),
        (Status.FAILED, lambda: Story().first_round()),
        (Status.CANCELLING, lambda: Story().statistics),
        (Status.CANCELLED, lambda: Story().first_round()),
    ],
)
def test_answers_are_shaped_as_those_of_qemu(
    told: dict[Status, dict[str, Any]], status: Status, statistics: Callable[[], Statistics]
) -> None:
    ours = statistics().query(status, capabilities=XBZRLE, error="no luck")
    assert shape(untyped(ours)) == shape(told[status])


@pytest.mark.qemu
def test_fixed_numbers_are_those_of_qemu(told: dict[Status, dict[str, Any]]) -> None:
    theirs = told[Status.CANCELLING]
    ours = Story().statistics.query(Status.CANCELLING, capabilities=XBZRLE)
    assert ours["xbzrle-cache"] == theirs["xbzrle-cache"]
    assert ours["setup-time"] == theirs["setup-time"] == 0
    done = told[Status.COMPLETED]["ram"]
    assert done["remaining"] == done["dirty-pages-rate"] == 0


@pytest.mark.qemu
def test_throttled(start_qemu: Callable[..., QemuProcess], tmp_path: Path) -> None:
    """A guest that writes all the time is slowed down by the steps that vmferry would take."""
    kernel = tmp_path / "walker"
    kernel.write_bytes(walker(pages=1024, hot=1024))
    machine = ("-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "16")
    vm = start_qemu(*machine, "-kernel", str(kernel))
    Serial(vm.serial).wait_ready(60.0)  # before that it writes nothing
    steps = {"cpu-throttle-initial": 15, "cpu-throttle-increment": 25, "max-cpu-throttle": 60}
    parameters = changed(Parameters(), steps | {"throttle-trigger-threshold": 1})
    throttling, fast = Throttling(), Period(sent=1 << 20, dirtied=1 << 20, seconds=1.5)
    slow = {"max-bandwidth": 4 << 20, "downtime-limit": 1, "throttle-trigger-threshold": 1}
    with Peer(tmp_path / "peer") as peer:
        vm.migrate(peer.uri, capabilities=["auto-converge", "events"], parameters=slow | steps)
        told = [0]
        while told[-1] < 60:
            vm.qmp.wait_event("MIGRATION_PASS", timeout=60.0)
            answer = vm.query_migrate()
            if (percentage := answer.get("cpu-throttle-percentage", 0)) != told[-1]:
                told.append(percentage)
        vm.execute("migrate_cancel")
    assert told[1:] == [throttling.step(fast, parameters) for _ in told[1:]] == [15, 40, 60]
    statistics = Story().first_round()
    statistics.expect(dirty_rate=1.0, downtime=1.0, throttle=throttling.percentage)
    ours = statistics.query(Status.ACTIVE)
    assert shape(untyped(ours)) == shape(answer)
    assert ours["cpu-throttle-percentage"] == 60


@pytest.mark.qemu
def test_incoming_is_shaped_as_that_of_qemu(
    start_qemu: Callable[..., QemuProcess], tmp_path: Path
) -> None:
    machine = ("-machine", "pc", "-accel", "tcg", "-nodefaults", "-m", "8", "-S")
    there = start_qemu(*machine, "-incoming", "defer")
    assert there.query_migrate() == query_incoming(Status.NONE)
    uri = f"unix:{tmp_path / 'there'}"
    there.incoming(uri)
    address = {"type": "unix", "path": str(tmp_path / "there")}
    assert there.query_migrate() == query_incoming(Status.NONE, [address])
    start_qemu(*machine).migrate(uri)
    answer = there.wait_migration()
    assert answer == query_incoming(Status.COMPLETED)
