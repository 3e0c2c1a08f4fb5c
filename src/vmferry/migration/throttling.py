"""Auto-converge: by how much to slow a machine down that writes faster than it can be sent.

QEMU 7.2 ``migration_trigger_throttle`` and ``mig_throttle_guest_down`` in ``migration/ram.c``.
"""

from __future__ import annotations

from .parameters import Parameters
from .rates import Period


class Throttling:
    """The percentage of time for which the machine is kept from running, and when it rises.

    It never falls within a migration; when that is over it is the machine's to forget.
    """

    def __init__(self) -> None:
        self._percentage = 0
        self._too_fast = 0

    @property
    def percentage(self) -> int:
        """0 for a machine that is not slowed down."""
        return self._percentage

    def judge(self, period: Period, parameters: Parameters) -> int | None:
        """The new percentage, if the machine was too fast in *period*, for the second time.

        As with QEMU the two need not be in a row.
        """
        if period.dirtied <= _allowed(period, parameters):
            return None
        self._too_fast += 1
        if self._too_fast < 2:
            return None
        self._too_fast = 0
        return self.step(period, parameters)

    def step(self, period: Period, parameters: Parameters) -> int | None:
        """The next percentage; ``None`` at the maximum."""
        before, most = self._percentage, parameters.max_cpu_throttle
        if before == 0:
            to = parameters.cpu_throttle_initial
        else:
            to = before + _increment(before, period, parameters)
        self._percentage = max(before, min(to, most))
        return self._percentage if self._percentage > before else None


def _allowed(period: Period, parameters: Parameters) -> int:
    """Bytes that the machine may write while so many are sent."""
    return period.sent * parameters.throttle_trigger_threshold // 100


def _increment(percentage: int, period: Period, parameters: Parameters) -> int:
    increment = parameters.cpu_throttle_increment
    if not parameters.cpu_throttle_tailslow or not period.dirtied:
        return increment
    # What the machine has to be left for its writes to come down to what is allowed.
    left = 100 - percentage
    enough = int(left * (_allowed(period, parameters) / period.dirtied))
    return max(min(left - enough, increment), 1)
