"""What would let a migration converge that does not, in words for whoever waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from vmferry.units import format_duration, format_rate

from .capabilities import Capability
from .parameters import Parameters, StallPolicy
from .stall import Stall

_LONGEST: Final = 2_000_000
"""Milliseconds: the largest downtime limit there is."""
_USED_UP: Final = 0.9
"""From what share of it on max-bandwidth is what holds a migration back."""


def with_advice(stall: Stall, parameters: Parameters, capabilities: frozenset[Capability]) -> Stall:
    """*stall* with all that would help, what can be done at once first."""
    return replace(stall, advice=tuple(_advice(stall, parameters, capabilities)))


def _advice(
    stall: Stall, parameters: Parameters, capabilities: frozenset[Capability]
) -> Iterator[str]:
    needed = stall.limit_needed
    if needed is not None and stall.downtime_limit < needed <= _LONGEST:
        limit = format_duration(needed / 1000)
        yield f"a downtime-limit of {limit} would do at this bandwidth"
    if stall.bandwidth_needed is not None:
        yield _bandwidth(stall, stall.bandwidth_needed, parameters)
    if Capability.AUTO_CONVERGE not in capabilities:
        if parameters.stall_policy is not StallPolicy.THROTTLE:
            yield "x-vmferry-stall-policy throttle slows the machine down until it does"
        yield "another attempt with auto-converge would slow the machine down"
    if not capabilities & {Capability.XBZRLE, Capability.MULTIFD}:
        yield "another attempt with xbzrle sends less where little changes in each page"


def _bandwidth(stall: Stall, needed: float, parameters: Parameters) -> str:
    # Sooner or later what is faster than the machine will do; what fits is certain.
    least, enough = format_rate(max(stall.dirty_rate, stall.bandwidth)), format_rate(needed)
    most = parameters.max_bandwidth
    if most and stall.bandwidth > _USED_UP * most:
        return f"max-bandwidth is used up; it takes more than {least}, and {enough} would do"
    return f"it takes a bandwidth of more than {least}, and {enough} would do"
