"""The numbers of a migration: QEMU's parameters by QEMU's names, and vmferry's own beside them.

QEMU 7.2 ``qapi/migration.json`` and ``migrate_params_check`` in ``migration/migration.c``;
``avail-switchover-bandwidth`` came with QEMU 8.2.  An attribute has QEMU's name with underscores.
What is vmferry's own is called ``x-vmferry-...`` where QEMU's names are used, so that it can never
be mistaken for what a QEMU means by the same word.

Every parameter may change at any time.  Those of multifd are read when a migration begins, all
others count at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from reprlib import repr as shortened
from typing import Annotated, Any, Final, Protocol, get_type_hints

from vmferry.errors import UsageError
from vmferry.wire.multifd import Method

from .names import unknown

_OWN: Final = "x-vmferry-"
_PAGE: Final = 4096
_U64: Final = (1 << 64) - 1


class Compression(StrEnum):
    """``multifd-compression``."""

    NONE = "none"
    ZLIB = "zlib"
    ZSTD = "zstd"

    @property
    def method(self) -> Method:
        """Its number on the wire."""
        return Method[self.name]


class StallPolicy(StrEnum):
    """What to do with a migration that makes no progress; all but the first come to an end."""

    KEEP_TRYING = "keep-trying"
    """Say so, and go on: as QEMU does, but that QEMU says nothing."""
    RAISE_DOWNTIME = "raise-downtime"
    """Raise the downtime limit step by step; give up where it stalls at the ceiling."""
    THROTTLE = "throttle"
    """Slow the machine down more and more; give up where it stalls at the maximum."""
    POSTCOPY = "postcopy"
    """Let the machine go before its memory (capability postcopy-ram); without that, give up."""
    GIVE_UP = "give-up"
    """The migration fails, and the machine runs on."""


class _Rule(Protocol):
    """What a parameter may be."""

    def checked(self, value: object) -> object:
        """*value* as it is kept, or :class:`TypeError` or :class:`ValueError`."""

    def __str__(self) -> str: ...


@dataclass(frozen=True, slots=True)
class _Whole:
    low: int
    high: int
    unit: str = ""

    def checked(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError
        if not self.low <= value <= self.high:
            raise ValueError
        return value

    def __str__(self) -> str:
        unit = f" ({self.unit})" if self.unit else ""
        return f"a whole number from {self.low} to {self.high}{unit}"


@dataclass(frozen=True, slots=True)
class _PowerOfTwo:
    def checked(self, value: object) -> int:
        number = _Whole(_PAGE, _U64).checked(value)
        if number & (number - 1):
            raise ValueError
        return number

    def __str__(self) -> str:
        return f"a power of two of bytes, {_PAGE} (a page) or more"


@dataclass(frozen=True, slots=True)
class _Seconds:
    def checked(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if not math.isfinite(value) or not 0 <= value <= 1e6:
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        return "a number from 0 to 1000000 (seconds)"


@dataclass(frozen=True, slots=True)
class _Flag:
    def checked(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True, slots=True)
class _Choice:
    of: type[StrEnum]

    def checked(self, value: object) -> StrEnum:
        if not isinstance(value, str):
            raise TypeError
        return self.of(value)

    def __str__(self) -> str:
        return " or ".join(self.of)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """All parameters of a migration, with QEMU's defaults.

    Raises :class:`~vmferry.errors.UsageError`, with what a parameter may be, for what it may not.
    Stricter than QEMU 7.2, which takes a negative ``max-bandwidth`` for a very large one and does
    not look at the levels of compression at all.

    QEMU's own:

    * ``max_bandwidth``: bytes per second over all channels while the machine runs, 0 for no limit.
    * ``max_postcopy_bandwidth``: bytes per second of memory that nobody has asked for, while the
      machine runs at the destination already, 0 for no limit.
    * ``avail_switchover_bandwidth``: bytes per second to count on in the switchover, 0 for what was
      measured.
    * ``downtime_limit``: milliseconds for which the machine may stand still.
    * ``block_incremental``: with capability block, only what the images have themselves is sent, as
      both sides have the same backing files.  Unlike QEMU's, it is for both sides: a destination
      without it refuses images that did not come whole.
    * ``multifd_channels``, ``multifd_compression``, ``multifd_zlib_level``, ``multifd_zstd_level``:
      the channels of capability multifd, the same number and compression on both sides.
    * ``xbzrle_cache_size``: bytes of pages kept for capability xbzrle.
    * ``throttle_trigger_threshold``: percent of the bytes sent that may be written anew meanwhile;
      with capability auto-converge the machine is slowed down above it.
    * ``cpu_throttle_initial``, ``cpu_throttle_increment``, ``max_cpu_throttle``: percent of time by
      which it is, at first, at each further step, and at most; ``cpu_throttle_tailslow`` for
      smaller steps towards the end.

    What to do with a migration that makes no progress:

    * ``stall_policy``, and when: after ``stall_rounds`` rounds *and* ``stall_seconds`` seconds
      in which what remains was never less than before.
    * ``downtime_step`` and ``downtime_ceiling``: milliseconds, for the policy ``raise-downtime``.

    How long a side waits, in seconds; 0 for ever:

    * ``connect_deadline``: until one more connection to the destination is open.
    * ``listen_deadline``: until a source connects.
    * ``hello_deadline``: from a connection to its first bytes, and until all channels are there.
    * ``idle_deadline``: while the other side has something to send, or to take, and does nothing.
    * ``answer_deadline``: for each word of the handover.
    * ``continue_deadline``: at ``pre-switchover``, until somebody says to go on.
    * ``drain_deadline``: of a machine that is stopped to be switched over, until its storage has
      done what was begun, and once more until it is flushed.
    """

    max_bandwidth: Annotated[int, _Whole(0, _U64, "bytes per second")] = 128 << 20
    max_postcopy_bandwidth: Annotated[int, _Whole(0, _U64, "bytes per second")] = 0
    avail_switchover_bandwidth: Annotated[int, _Whole(0, _U64, "bytes per second")] = 0
    downtime_limit: Annotated[int, _Whole(0, 2_000_000, "milliseconds")] = 300
    block_incremental: Annotated[bool, _Flag()] = False
    multifd_channels: Annotated[int, _Whole(1, 255, "channels")] = 2
    multifd_compression: Annotated[Compression, _Choice(Compression)] = Compression.NONE
    multifd_zlib_level: Annotated[int, _Whole(0, 9)] = 1
    multifd_zstd_level: Annotated[int, _Whole(0, 20)] = 1
    xbzrle_cache_size: Annotated[int, _PowerOfTwo()] = 64 << 20
    throttle_trigger_threshold: Annotated[int, _Whole(1, 100, "percent")] = 50
    cpu_throttle_initial: Annotated[int, _Whole(1, 99, "percent")] = 20
    cpu_throttle_increment: Annotated[int, _Whole(1, 99, "percent")] = 10
    cpu_throttle_tailslow: Annotated[bool, _Flag()] = False
    max_cpu_throttle: Annotated[int, _Whole(1, 99, "percent")] = 99

    stall_policy: Annotated[StallPolicy, _Choice(StallPolicy), _OWN] = StallPolicy.KEEP_TRYING
    stall_rounds: Annotated[int, _Whole(1, 10_000, "rounds"), _OWN] = 5
    stall_seconds: Annotated[float, _Seconds(), _OWN] = 5.0
    downtime_step: Annotated[int, _Whole(1, 2_000_000, "milliseconds"), _OWN] = 150
    downtime_ceiling: Annotated[int, _Whole(0, 2_000_000, "milliseconds"), _OWN] = 1500

    connect_deadline: Annotated[float, _Seconds(), _OWN] = 30.0
    listen_deadline: Annotated[float, _Seconds(), _OWN] = 0.0
    hello_deadline: Annotated[float, _Seconds(), _OWN] = 30.0
    idle_deadline: Annotated[float, _Seconds(), _OWN] = 60.0
    answer_deadline: Annotated[float, _Seconds(), _OWN] = 60.0
    continue_deadline: Annotated[float, _Seconds(), _OWN] = 300.0
    drain_deadline: Annotated[float, _Seconds(), _OWN] = 30.0

    def __post_init__(self) -> None:
        for name, (attribute, rule) in _KNOWN.items():
            object.__setattr__(self, attribute, _checked(name, rule, getattr(self, attribute)))
        if self.max_cpu_throttle < self.cpu_throttle_initial:
            raise UsageError(
                f"max-cpu-throttle is from cpu-throttle-initial, {self.cpu_throttle_initial}"
                f" percent, to 99, not {self.max_cpu_throttle}"
            )

    def to_qmp(self) -> dict[str, object]:
        """The answer to ``query-migrate-parameters``: names, units and order as QEMU has them."""
        return {name: getattr(self, attribute) for name, (attribute, _) in _KNOWN.items()}


def _known() -> Iterator[tuple[str, tuple[str, _Rule]]]:
    """What each name stands for: an attribute, and what it may be."""
    for attribute, hint in get_type_hints(Parameters, include_extras=True).items():
        rule, *own = hint.__metadata__
        yield "".join(own) + attribute.replace("_", "-"), (attribute, rule)


_KNOWN: Final = dict(_known())

NOT_SUPPORTED: Final[Mapping[str, object]] = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "compress-level": 1,
    "compress-threads": 8,
    "compress-wait-thread": True,
    "decompress-threads": 2,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "x-checkpoint-delay": 20000,
    "block-bitmap-mapping": [],
}
"""QEMU 7.2's other parameters and their defaults, which is all that they can be set to."""


def changed(current: Parameters, changes: Mapping[str, object]) -> Parameters:
    """*current* with *changes*, by QEMU's names and in QEMU's units.

    Raises :class:`~vmferry.errors.UsageError`, and nothing has changed then.
    """
    values: dict[str, Any] = {}
    for name, value in changes.items():
        if name in NOT_SUPPORTED:
            _check_default(name, value)
        elif name in _KNOWN:
            values[_KNOWN[name][0]] = value
        else:
            raise unknown("parameter", name, [*_KNOWN, *NOT_SUPPORTED])
    return replace(current, **values)


def _checked(name: str, rule: _Rule, value: object) -> Any:
    try:
        return rule.checked(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} is {rule}, not {shortened(value)}") from None


def _check_default(name: str, value: object) -> None:
    default = NOT_SUPPORTED[name]
    if type(value) is not type(default) or value != default:
        stays = f"it stays {default!r}, not {shortened(value)}"
        raise UsageError(f"{name} is not supported by vmferry (yet): {stays}")
