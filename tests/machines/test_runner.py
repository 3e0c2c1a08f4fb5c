"""The threads of vCPUs, with vCPUs that do what the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.transports.support import background, wait_until
from vmferry.errors import MachineError, UsageError
from vmferry.machines import runner as runner_module
from vmferry.machines.cpu import Exit
from vmferry.machines.cpu_state import CpuState
from vmferry.machines.runner import Runner


class Scripted:
    """A vCPU that runs until it is kicked, or ends at once as the script says."""

    def __init__(self, *script: Exit | Exception, deaf: int = 0) -> None:
        self.script = list(script)
        self.deaf = deaf
        self.kicked = threading.Event()
        self.inside = False
        self.runs: list[tuple[float, float]] = []

    def run(self) -> Exit:
        began = time.monotonic()
        self.inside = True
        try:
            if self.script:
                step = self.script.pop(0)
                if isinstance(step, Exception):
                    raise step
                return step
            self.kicked.wait()
            self.kicked.clear()
        finally:
            self.inside = False
            self.runs.append((began, time.monotonic()))
        return Exit.KICKED

    def kick(self) -> None:
        if self.deaf:
            self.deaf -= 1
        else:
            self.kicked.set()

    def read(self, state: CpuState) -> None:
        raise AssertionError(state)

    def write(self, state: CpuState) -> None:
        raise AssertionError(state)


class Ended:
    """Counts how often the machine has ended."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


Make = Callable[..., Runner]


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes runners that are closed with the test."""
    with ExitStack() as stack:

        def made(
            *vcpus: Scripted,
            until_alarm: Callable[[int], float | None] = lambda _: None,
            ended: Callable[[], None] = lambda: None,
        ) -> Runner:
            runner = Runner(vcpus, until_alarm=until_alarm, ended=ended)
            stack.callback(runner.close)
            return runner

        yield made


def test_vcpus_are_paused_at_first_and_run_between(make: Make) -> None:
    vcpus = [Scripted(), Scripted()]
    runner = make(*vcpus)
    runner.pause()
    assert not any(vcpu.runs or vcpu.inside for vcpu in vcpus)
    for _ in range(100):
        runner.resume()
        wait_until(lambda: all(vcpu.inside for vcpu in vcpus))
        runner.pause()
        assert not any(vcpu.inside for vcpu in vcpus)
    assert all(len(vcpu.runs) == 100 for vcpu in vcpus)


def test_kick_that_is_lost_is_repeated(make: Make) -> None:
    vcpu = Scripted(deaf=5)
    runner = make(vcpu)
    runner.resume()
    wait_until(lambda: vcpu.inside)
    runner.pause()
    assert (vcpu.deaf, vcpu.inside) == (0, False)


def test_vcpu_that_does_not_stop_is_an_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "_PATIENCE", 0.05)
    vcpu = Scripted(deaf=1 << 30)
    runner = make(vcpu)
    runner.resume()
    wait_until(lambda: vcpu.inside)
    with pytest.raises(MachineError, match="vCPU 0 does not stop"):
        runner.pause()
    vcpu.deaf = 0


def test_halted_vcpu_runs_on_at_its_alarm(make: Make) -> None:
    vcpu = Scripted(Exit.HALTED)
    make(vcpu, until_alarm=lambda _: 0.05).resume()
    wait_until(lambda: vcpu.inside)
    assert time.monotonic() - vcpu.runs[0][1] >= 0.05


def test_vcpu_that_rests_is_kicked_and_waits_for_its_alarm(make: Make) -> None:
    class Resting(Scripted):
        def run(self) -> Exit:
            if not self.runs:
                runner.rest(0)
            return super().run()

    vcpu = Resting()
    runner = make(vcpu, until_alarm=lambda _: 0.05)
    runner.resume()
    wait_until(lambda: vcpu.inside and len(vcpu.runs) == 1)
    assert time.monotonic() - vcpu.runs[0][1] >= 0.05


def test_halted_vcpu_without_alarm_rests(make: Make) -> None:
    vcpu = Scripted(Exit.HALTED)
    runner = make(vcpu)
    runner.resume()
    wait_until(lambda: len(vcpu.runs) == 1)
    time.sleep(0.02)
    assert not vcpu.inside


def test_vcpu_that_cannot_go_on_ends_all(make: Make) -> None:
    vcpus, ended = [Scripted(), Scripted(ValueError("it broke"))], Ended()
    runner = make(*vcpus, ended=ended)
    runner.resume()
    wait_until(lambda: ended.count == 1)
    assert str(runner.failure) == "it broke"
    wait_until(lambda: not vcpus[0].inside)
    runner.resume()
    time.sleep(0.02)
    assert not any(vcpu.inside for vcpu in vcpus)
    assert ended.count == 1


def test_first_of_two_failures_is_kept(make: Make) -> None:
    ended = Ended()
    runner = make(Scripted(ValueError("one")), Scripted(ValueError("two")), ended=ended)
    runner.resume()
    wait_until(lambda: ended.count == 1)
    assert str(runner.failure) in {"one", "two"}


def test_end_may_come_from_a_vcpu(make: Make) -> None:
    class Ending(Scripted):
        def run(self) -> Exit:
            runner.end()
            return super().run()

    vcpu, other = Ending(), Scripted()
    runner = make(vcpu, other)
    runner.resume()
    wait_until(lambda: len(vcpu.runs) == 1 and not other.inside)
    runner.pause()


def test_throttled_vcpus_rest_for_their_share(make: Make) -> None:
    vcpu = Scripted()
    runner = make(vcpu)
    runner.resume()
    runner.throttle(80)
    wait_until(lambda: len(vcpu.runs) > 4)
    runner.throttle(0)
    wait_until(lambda: vcpu.inside)
    rests = [after[0] - before[1] for before, after in zip(vcpu.runs, vcpu.runs[1:4], strict=False)]
    assert min(rests) > 0.035  # 40 ms, less what a vCPU takes to hear that it is to rest
    count = len(vcpu.runs)
    time.sleep(0.05)
    assert len(vcpu.runs) == count


def test_pause_does_not_wait_for_the_throttle_and_outlasts_it(make: Make) -> None:
    vcpu = Scripted()
    runner = make(vcpu)
    runner.resume()
    runner.throttle(99)
    wait_until(lambda: len(vcpu.runs) > 0)
    background(runner.pause).result(0.5)  # a rest is one second
    runner.throttle(0)
    time.sleep(0.03)
    assert not vcpu.inside
    runner.resume()
    wait_until(lambda: vcpu.inside)


@pytest.mark.parametrize("percent", [-1, 100])
def test_throttle_has_a_range(make: Make, percent: int) -> None:
    with pytest.raises(UsageError, match="0 to 99 percent"):
        make(Scripted()).throttle(percent)


def test_closed_runner_has_no_threads() -> None:
    before = set(threading.enumerate())
    runner = Runner(
        [Scripted(), Scripted(Exit.HALTED)], until_alarm=lambda _: None, ended=lambda: None
    )
    runner.resume()
    runner.throttle(50)
    runner.close()
    runner.close()
    assert set(threading.enumerate()) <= before
