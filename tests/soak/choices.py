"""How a machine is made and moved, by chance."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from uuid import UUID

from vmferry.machines import GuestConfig, MachineConfig

MIB = 1 << 20
_ONE_WAY = frozenset({"exec", "file"})
_QUICK = 0.3
"""The share of attempts to cancel that do not wait for the migration to get anywhere."""

Parameters = dict[str, object]


@dataclass(frozen=True, slots=True)
class Choice:
    """One attempt to move a machine.

    ``cancel`` is when it is cancelled, in seconds, if it is; ``refuses_switchover`` is that it is
    cancelled where it pauses before the switchover.
    """

    transport: str
    capabilities: dict[str, bool]
    parameters: Parameters
    is_stopped: bool
    cancel: float | None
    refuses_switchover: bool

    def __str__(self) -> str:
        on = [name for name, state in self.capabilities.items() if state]
        numbers = [f"{name}={value}" for name, value in self.parameters.items()]
        return " ".join([self.transport, *on, *numbers])


def machine(rng: Random, kind: str) -> MachineConfig:
    """A machine that any host can run fast enough."""
    ram = rng.choice([2, 8, 24, 64, 128]) * MIB
    most = ram // 2
    return MachineConfig(
        kind=kind,
        ram=ram,
        cpus=rng.choice([1, 1, 2]),
        uuid=UUID(int=rng.getrandbits(128)),
        guest=GuestConfig(
            working_set=rng.choice([16 << 10, MIB // 2, most // 4, most]),
            rate=rng.choice([None, 500, 5_000, 20_000]),
            hot=rng.choice([0.1, 0.5, 1.0]),
            changed=rng.choice([0.02, 0.2, 1.0]),
            heartbeat=0.02,
        ),
    )


def choose(rng: Random, *, may_cancel: bool, has_pair: bool, has_record: bool) -> Choice:
    """An attempt; *has_pair* says whether both sides have an end of a socket pair.

    With *has_record*, of who owns the machine, the destination has to be able to answer.
    """
    one_way = [] if has_record else sorted(_ONE_WAY)
    transport = rng.choice(["unix", "unix", "unix", "tcp", "tcp", *one_way, *["fd"] * has_pair])
    capabilities = _capabilities(rng, transport)
    if has_record:
        capabilities["return-path"] = True
    cancels = may_cancel and rng.random() < 0.3
    refuses = cancels and capabilities["pause-before-switchover"]
    parameters = _parameters(rng, capabilities)
    if cancels and not refuses and rng.random() > _QUICK:
        parameters |= {"max-bandwidth": rng.choice([5, 20]) * MIB, "downtime-limit": 1}
    return Choice(
        transport,
        capabilities,
        parameters,
        is_stopped=rng.random() < 0.1,
        cancel=rng.uniform(0, 0.8) ** 2 if cancels and not refuses else None,
        refuses_switchover=refuses,
    )


def _capabilities(rng: Random, transport: str) -> dict[str, bool]:
    def perhaps(chance: float) -> bool:
        return rng.random() < chance

    return {
        "return-path": transport not in _ONE_WAY and perhaps(0.9),
        "multifd": transport in ("unix", "tcp") and perhaps(0.5),
        "xbzrle": perhaps(0.4),
        "auto-converge": perhaps(0.3),
        "pause-before-switchover": perhaps(0.25),
        "validate-uuid": perhaps(0.3),
        "events": perhaps(0.5),
    }


def _parameters(rng: Random, capabilities: dict[str, bool]) -> Parameters:
    chosen: Parameters = {
        "max-bandwidth": rng.choice([0, 0, 30 * MIB, 100 * MIB, 400 * MIB]),
        "avail-switchover-bandwidth": rng.choice([0, 0, 1 << 30]),
        "downtime-limit": rng.choice([1, 8, 50, 300, 1000]),
        "x-vmferry-stall-policy": rng.choice(
            ["keep-trying", "raise-downtime", "throttle", "give-up"]
        ),
        "x-vmferry-stall-rounds": rng.choice([2, 5]),
        "x-vmferry-stall-seconds": rng.choice([0.1, 0.5]),
    }
    if capabilities["multifd"]:
        chosen |= {
            "multifd-channels": rng.randint(1, 4),
            "multifd-compression": rng.choice(["none", "none", "zlib", "zstd"]),
            "multifd-zlib-level": rng.randint(0, 3),
            "multifd-zstd-level": rng.randint(0, 3),
        }
    if capabilities["xbzrle"]:
        chosen["xbzrle-cache-size"] = 1 << rng.randint(12, 26)
    if capabilities["auto-converge"]:
        chosen |= {
            "throttle-trigger-threshold": rng.choice([5, 50]),
            "cpu-throttle-initial": rng.choice([10, 50]),
            "cpu-throttle-increment": rng.choice([10, 40]),
            "cpu-throttle-tailslow": rng.random() < 0.5,
        }
    return chosen
