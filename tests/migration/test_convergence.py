"""What converges is let converge and never called stalled; what does not, always is, and ends."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.migration.workloads import (
    GIB,
    MIB,
    Outcome,
    Writes,
    bursts,
    growing,
    levels,
    migrate,
    steady,
)
from vmferry.migration.capabilities import Capability
from vmferry.migration.convergence import Convergence, Decision, Round
from vmferry.migration.parameters import Parameters, StallPolicy

BANDWIDTH = 100 * MIB
AUTO_CONVERGE = frozenset({Capability.AUTO_CONVERGE})
NOTHING: frozenset[Capability] = frozenset()
ENDING = [policy for policy in StallPolicy if policy is not StallPolicy.KEEP_TRYING]


def quick(policy: StallPolicy = StallPolicy.KEEP_TRYING, **others: float) -> Parameters:
    """A stall is a matter of rounds alone."""
    return Parameters(stall_policy=policy, stall_seconds=0, max_bandwidth=0, **others)  # type: ignore[arg-type]


# When to switch over


def test_switchover_is_when_the_rest_fits() -> None:
    convergence = Convergence()
    convergence.sample(10 * MIB, 0.1)
    parameters = Parameters(downtime_limit=300)
    assert convergence.threshold(parameters) == 30 * MIB
    assert convergence.fits(30 * MIB, parameters)
    assert not convergence.fits(30 * MIB + 1, parameters)
    assert convergence.expected_downtime(15 * MIB, parameters) == pytest.approx(0.15)


def test_devices_and_what_else_takes_time_count() -> None:
    convergence = Convergence(device_bytes=MIB, overhead=0.1)
    convergence.sample(10 * MIB, 0.1)
    parameters = Parameters(downtime_limit=300)
    assert convergence.threshold(parameters) == 19 * MIB
    assert convergence.expected_downtime(19 * MIB, parameters) == pytest.approx(0.3)
    assert convergence.threshold(Parameters(downtime_limit=50)) == 0


def test_nothing_left_always_fits() -> None:
    convergence = Convergence(device_bytes=MIB, overhead=1.0)
    parameters = Parameters(downtime_limit=0)
    ended = Round(sent=0, seconds=0.0, remaining=0, dirtied=0)
    assert convergence.round_ended(ended, parameters, NOTHING) == Decision(switch_over=True)


def test_nothing_is_expected_before_anything_moved() -> None:
    convergence = Convergence()
    assert convergence.expected_downtime(1, Parameters()) is None
    assert convergence.threshold(Parameters()) == 0


def test_first_round_counts_where_there_was_no_sample() -> None:
    convergence = Convergence()
    ended = Round(sent=50 * MIB, seconds=0.05, remaining=250 * MIB, dirtied=250 * MIB)
    assert convergence.round_ended(ended, Parameters(), NOTHING).switch_over
    assert convergence.bandwidth(Parameters()) == pytest.approx(1000 * MIB)


def test_given_bandwidth_goes_before_what_was_measured() -> None:
    convergence = Convergence()
    convergence.sample(10 * MIB, 0.1)
    parameters = Parameters(avail_switchover_bandwidth=BANDWIDTH * 10)
    assert convergence.threshold(parameters) == 300 * MIB
    assert convergence.expected_downtime(100 * MIB, parameters) == pytest.approx(0.1)


def test_lucky_sample_does_not_count_for_much() -> None:
    convergence = Convergence()
    for _ in range(20):
        convergence.sample(10 * MIB, 0.1)
    convergence.sample(100 * MIB, 0.1)
    assert convergence.bandwidth(Parameters()) < 500 * MIB
    convergence.sample(1 * MIB, 0.1)  # a bad one counts at once
    assert convergence.bandwidth(Parameters()) == pytest.approx(10 * MIB)
    convergence.sample(5, 0.0)
    assert convergence.bandwidth(Parameters()) == pytest.approx(10 * MIB)


def test_dirty_rate_is_that_of_more_than_a_second() -> None:
    convergence = Convergence()
    for dirtied in (10, 20):
        convergence.round_ended(Round(1, 0.25, GIB, dirtied * MIB), Parameters(), NOTHING)
    assert convergence.dirty_rate == pytest.approx(60 * MIB)
    convergence.round_ended(Round(1, 1.0, GIB, 0), Parameters(), NOTHING)
    assert convergence.dirty_rate == pytest.approx(20 * MIB)
    convergence.round_ended(Round(1, 0.5, GIB, 500 * MIB), Parameters(), NOTHING)
    assert convergence.dirty_rate == pytest.approx(20 * MIB)


# What converges


@given(
    rate=st.floats(0, 0.95),
    limit=st.integers(1, 2000),
    policy=st.sampled_from(StallPolicy),
    bandwidth=st.sampled_from([MIB, 100 * MIB, 10 * GIB]),
    capabilities=st.sampled_from([NOTHING, AUTO_CONVERGE]),
)
def test_slower_than_the_connection_is_never_stalled(
    rate: float,
    limit: int,
    policy: StallPolicy,
    bandwidth: int,
    capabilities: frozenset[Capability],
) -> None:
    went = migrate(
        steady(rate * bandwidth),
        parameters=quick(policy, downtime_limit=limit),
        capabilities=capabilities,
        bandwidth=bandwidth,
    )
    assert went.switched_over
    assert went.stalls == []
    assert went.downtime <= limit / 1000


@given(
    working_set=st.integers(1, 29 * MIB),
    rate=st.floats(0.1, 100),
    policy=st.sampled_from(StallPolicy),
)
def test_working_set_that_fits_is_never_stalled(
    working_set: int, rate: float, policy: StallPolicy
) -> None:
    went = migrate(steady(rate * BANDWIDTH, working_set), parameters=quick(policy))
    assert went.switched_over
    assert went.stalls == []
    assert went.rounds <= 2


@given(
    every=st.floats(8, 25),
    lasting=st.floats(0.1, 2.0),
    wild=st.floats(1.5, 20),
    policy=st.sampled_from(StallPolicy),
)
@example(every=20.4, lasting=1.0, wild=20.0, policy=StallPolicy.GIVE_UP)
def test_short_bursts_are_no_stall(
    every: float, lasting: float, wild: float, policy: StallPolicy
) -> None:
    """What is left behind a burst falls from round to round, until it is less than ever before."""
    calm, burst = steady(0.5 * BANDWIDTH), steady(wild * BANDWIDTH, 200 * MIB)
    workload = bursts(calm, burst, every=every, lasting=lasting)
    went = migrate(workload, parameters=quick(policy, downtime_limit=20))
    assert went.switched_over
    assert went.stalls == []


def test_burst_is_seen_by_the_migration_at_all() -> None:
    workload = bursts(steady(0.5 * BANDWIDTH), steady(20 * BANDWIDTH), every=20.4, lasting=1.0)
    left = migrate(workload, parameters=quick(downtime_limit=20)).remaining
    assert left != sorted(left, reverse=True)


def test_burst_in_every_few_rounds_is_waited_out() -> None:
    falling = levels(
        100 * MIB, 80 * MIB, 60 * MIB, 40 * MIB, 110 * MIB, 90 * MIB, 70 * MIB, 35 * MIB
    )
    assert migrate(falling, parameters=quick(StallPolicy.GIVE_UP), rounds=8).stalls == []


# What does not


@given(
    rate=st.floats(1.05, 50),
    working_set=st.integers(40 * MIB, GIB),
    needed=st.integers(1, 30),
)
def test_faster_than_the_connection_stalls_after_so_many_rounds(
    rate: float, working_set: int, needed: int
) -> None:
    went = migrate(
        steady(rate * BANDWIDTH, working_set),
        parameters=quick(stall_rounds=needed),
        rounds=needed + 60,
    )
    assert not went.switched_over
    assert went.stalls[0] == needed + 1  # the first round is the one to better


def test_stall_takes_its_seconds_too() -> None:
    workload = steady(2 * BANDWIDTH, 50 * MIB)  # rounds of half a second
    parameters = Parameters(stall_rounds=3, stall_seconds=10, max_bandwidth=0)
    assert migrate(workload, parameters=parameters).stalls == [21]


def test_growing_workload_stalls_when_it_has_outgrown_the_connection() -> None:
    went = migrate(growing(0.2 * BANDWIDTH, 0.05 * BANDWIDTH), parameters=quick(downtime_limit=10))
    lowest = went.remaining.index(min(went.remaining)) + 1
    assert went.stalls[0] == lowest + 5


def test_stall_is_reported_once_and_again_when_things_change() -> None:
    for until, reports in ((100, 1), (200, 2), (300, 2)):
        sizes = [50.0 * MIB] * 100 + [80.0 * MIB] * 100 + [70.0 * MIB] * 100
        went = migrate(levels(*sizes), parameters=quick(), rounds=until)
        assert len(went.stalls) == reports
        assert not went.gave_up

    def changing(number: int) -> Parameters:
        return quick(downtime_limit=300 if number < 50 else 310)

    went = migrate(levels(50 * MIB), parameters=changing, rounds=100)
    assert went.stalls == [6, 55]


def test_noise_on_one_level_is_one_report() -> None:
    sizes = [50.0 * MIB + 5 * MIB * math.sin(7 * number) for number in range(400)]
    assert len(migrate(levels(*sizes), parameters=quick(), rounds=400).stalls) == 1


def test_report_says_what_would_help() -> None:
    workload = steady(2 * BANDWIDTH, 183 * MIB)
    went = migrate(workload, parameters=quick(), rounds=20)
    stall = went.decisions[went.stalls[0] - 1].stall
    assert stall is not None
    assert (stall.rounds, stall.remaining, stall.downtime_limit) == (5, 183 * MIB, 300)
    assert stall.bandwidth == pytest.approx(BANDWIDTH)
    assert stall.limit_needed == 1904
    assert stall.bandwidth_needed == pytest.approx(183 * MIB * 1.04 / 0.3)
    assert str(stall) == (
        "no progress for 5 rounds (9.15 s): 183 MiB or more remain, 100 MiB/s are written and"
        " 100 MiB/s sent, with a downtime limit of 300 ms; a downtime-limit of 1.9 s would do at"
        " this bandwidth; or it takes a bandwidth of more than 100 MiB/s, and 634 MiB/s would do;"
        " or x-vmferry-stall-policy throttle slows the machine down until it does; or another"
        " attempt with auto-converge would slow the machine down; or another attempt with xbzrle"
        " sends less where little changes in each page"
    )


@pytest.mark.parametrize(
    ("parameters", "capabilities", "there", "not_there"),
    [
        (quick(), AUTO_CONVERGE, "xbzrle", "slow"),
        (quick(), frozenset({Capability.XBZRLE}), "auto-converge", "xbzrle"),
        (quick(), frozenset({Capability.MULTIFD}), "auto-converge", "xbzrle"),
        (quick(StallPolicy.GIVE_UP, downtime_limit=0), NOTHING, "downtime-limit", "a bandwidth"),
        (
            Parameters(max_bandwidth=BANDWIDTH, stall_seconds=0),
            NOTHING,
            "max-bandwidth is used up; it takes more than 100 MiB/s, and 181 MiB/s would do",
            "a bandwidth",
        ),
    ],
)
def test_advice_fits_the_case(
    parameters: Parameters, capabilities: frozenset[Capability], there: str, not_there: str
) -> None:
    went = migrate(levels(52.2 * MIB), parameters=parameters, capabilities=capabilities, rounds=60)
    stall = went.decisions[went.stalls[0] - 1].stall
    assert stall is not None
    advice = "; ".join(stall.advice)
    assert there in advice
    assert not_there not in advice


# What is done about it


@given(
    working_set=st.integers(40 * MIB, 300 * MIB),
    step=st.integers(1, 500),
    ceiling=st.integers(0, 2500),
    needed=st.integers(1, 10),
)
def test_raising_the_limit_ends_it(working_set: int, step: int, ceiling: int, needed: int) -> None:
    parameters = quick(
        StallPolicy.RAISE_DOWNTIME,
        downtime_step=step,
        downtime_ceiling=ceiling,
        stall_rounds=needed,
    )
    went = migrate(steady(2 * BANDWIDTH, working_set), parameters=parameters)
    assert went.switched_over or went.gave_up
    assert went.limit <= max(ceiling, 300)
    assert went.rounds <= 2 * needed + 1
    takes = working_set / BANDWIDTH * 1000
    if went.switched_over:
        assert went.downtime * 1000 <= went.limit < takes * 1.04 + step + 1
    else:
        assert takes > ceiling


def test_limit_is_raised_by_whole_steps() -> None:
    went = migrate(
        levels(100 * MIB, 61 * MIB), parameters=quick(StallPolicy.RAISE_DOWNTIME), rounds=100
    )
    raised = [one.downtime_limit for one in went.decisions if one.downtime_limit]
    assert raised == [750]
    assert went.switched_over


def test_switchover_is_near_the_minimum() -> None:
    """Not in the round in which the limit is raised, if that is one of the bad ones."""
    went = migrate(
        levels(100 * MIB, 60 * MIB, 90 * MIB, 110 * MIB),
        parameters=quick(StallPolicy.RAISE_DOWNTIME, stall_rounds=6, downtime_step=10),
    )
    assert went.switched_over
    assert went.remaining[-1] == 60 * MIB
    assert went.limit == 630


def test_minimum_that_does_not_come_again_is_not_waited_for() -> None:
    falling = iter([50 * MIB, *[100 * MIB] * 100])
    went = migrate(falling, parameters=quick(StallPolicy.RAISE_DOWNTIME), rounds=100)
    raised = [one.downtime_limit for one in went.decisions if one.downtime_limit]
    assert raised == [600, 1050]
    assert went.switched_over
    assert went.rounds == 1 + 5 + 5


def test_new_limit_of_the_user_goes_before_the_raised_one() -> None:
    def parameters(number: int) -> Parameters:
        return quick(StallPolicy.RAISE_DOWNTIME, downtime_limit=300 if number < 8 else 310)

    went = migrate(iter([50 * MIB, *[100 * MIB] * 100]), parameters=parameters, rounds=8)
    assert went.limit == 310


def test_give_up_gives_up_at_once() -> None:
    went = migrate(levels(50 * MIB), parameters=quick(StallPolicy.GIVE_UP))
    assert went.gave_up
    assert went.rounds == 6
    assert went.decisions[-1].stall is not None


def test_throttle_goes_up_to_the_maximum_and_then_gives_up() -> None:
    parameters = quick(StallPolicy.THROTTLE, max_cpu_throttle=45)
    went = migrate(levels(50 * MIB), parameters=parameters)
    assert [one.throttle for one in went.decisions if one.stall] == [20, 30, 40, 45, None]
    assert went.stalls == [6, 11, 16, 21, 26]
    assert went.gave_up


@given(rate=st.floats(1.05, 4), tailslow=st.booleans())
def test_throttle_ends_what_can_be_slowed_down(rate: float, tailslow: bool) -> None:
    parameters = quick(StallPolicy.THROTTLE, cpu_throttle_tailslow=tailslow)
    went = migrate(steady(rate * BANDWIDTH), parameters=parameters, rounds=2000)
    assert went.switched_over
    steps = [one.throttle for one in went.decisions if one.throttle]
    assert steps == sorted(steps)
    assert steps[0] == 20


@given(
    policy=st.sampled_from(ENDING),
    sizes=st.lists(st.integers(31 * MIB, GIB), min_size=1, max_size=50),
    capabilities=st.sampled_from([NOTHING, AUTO_CONVERGE]),
    needed=st.integers(1, 8),
    limit=st.integers(0, 300),
    step=st.integers(100, 1000),
)
def test_nobody_runs_for_ever_under_a_policy_that_ends(
    policy: StallPolicy,
    sizes: list[int],
    capabilities: frozenset[Capability],
    needed: int,
    limit: int,
    step: int,
) -> None:
    """Whatever a machine does, over and over."""
    parameters = quick(policy, stall_rounds=needed, downtime_limit=limit, downtime_step=step)
    went = migrate(levels(*sizes), parameters=parameters, capabilities=capabilities, rounds=3000)
    assert went.switched_over or went.gave_up


@given(sizes=st.lists(st.integers(31 * MIB, GIB), min_size=1, max_size=50))
def test_keep_trying_never_gives_up(sizes: list[int]) -> None:
    went = migrate(levels(*sizes), parameters=quick(), rounds=300)
    assert all(one == Decision(stall=one.stall) for one in went.decisions)
    assert went.stalls


# Auto-converge


def percentages(workload: Writes, parameters: Parameters, rounds: int = 40) -> list[int]:
    went: Outcome = migrate(
        workload, parameters=parameters, capabilities=AUTO_CONVERGE, rounds=rounds
    )
    return [one.throttle for one in went.decisions if one.throttle]


def test_auto_converge_slows_down_until_it_converges() -> None:
    workload = steady(1.5 * BANDWIDTH)
    went = migrate(
        workload, parameters=quick(StallPolicy.GIVE_UP), capabilities=AUTO_CONVERGE, rounds=100
    )
    assert went.switched_over
    assert went.stalls == []
    # It goes on until half of what is sent is written, while that is under way.
    assert percentages(workload, quick(), 100) == [20, 30, 40, 50, 60, 70]


def test_auto_converge_is_off_unless_asked_for() -> None:
    went = migrate(steady(1.5 * BANDWIDTH), parameters=quick(), rounds=50)
    assert not any(one.throttle for one in went.decisions)


def test_auto_converge_has_its_maximum() -> None:
    workload = steady(100 * BANDWIDTH)
    parameters = quick(cpu_throttle_initial=15, cpu_throttle_increment=25, max_cpu_throttle=60)
    assert percentages(workload, parameters) == [15, 40, 60]


def test_stall_waits_for_auto_converge_to_be_at_its_end() -> None:
    parameters = quick(StallPolicy.GIVE_UP, max_cpu_throttle=40)
    went = migrate(steady(100 * BANDWIDTH), parameters=parameters, capabilities=AUTO_CONVERGE)
    assert went.gave_up
    assert [one.throttle for one in went.decisions if one.throttle] == [20, 30, 40]


def test_trigger_is_twice_and_more_than_the_threshold() -> None:
    def rounds(*dirtied: float, threshold: int = 50) -> list[int | None]:
        convergence = Convergence()
        convergence.sample(BANDWIDTH, 1.0)
        parameters = Parameters(throttle_trigger_threshold=threshold)
        return [
            convergence.round_ended(
                Round(100 * MIB, 1.5, GIB, int(one * MIB)), parameters, AUTO_CONVERGE
            ).throttle
            for one in dirtied
        ]

    assert rounds(51, 51, 51, 51) == [None, 20, None, 30]
    assert rounds(50, 50, 50, 50) == [None] * 4
    assert rounds(51, 20, 51) == [None, None, 20]
    assert rounds(99, 99, threshold=100) == [None, None]
    assert rounds(101, 101, threshold=100) == [None, 20]


def test_short_rounds_are_judged_together() -> None:
    convergence = Convergence()
    convergence.sample(BANDWIDTH, 1.0)
    ended = Round(10 * MIB, 0.125, GIB, 10 * MIB)
    told = [convergence.round_ended(ended, Parameters(), AUTO_CONVERGE).throttle for _ in range(18)]
    assert told == [None] * 17 + [20]


@pytest.mark.parametrize(
    ("dirtied", "step"),
    [
        (200, 10),  # half of 80 would do: 40, and no more than the increment
        (51, 2),  # 80 * 50 / 51 = 78.4
        (55, 8),  # 80 * 50 / 55 = 72.7
    ],
)
def test_tailslow_takes_what_is_enough(dirtied: int, step: int) -> None:
    convergence = Convergence()
    convergence.sample(BANDWIDTH, 1.0)
    parameters = Parameters(cpu_throttle_tailslow=True)
    for _ in range(4):
        ended = Round(100 * MIB, 1.5, GIB, dirtied * MIB)
        convergence.round_ended(ended, parameters, AUTO_CONVERGE)
    assert convergence.throttle == 20 + step
