"""Saved machines that are restored into QEMU again and again, each time by chance."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Final

import vmferry
from guests.linux import LinuxGuest, Shell, lacks
from tests.interop.lab import Lab
from tests.interop.test_restore import MACHINES
from tests.support.capture import Scenario
from vmferry.qemu import QemuProcess

_LINUX: Final = LinuxGuest(memory=512, data=16)
_LONG: Final = 180.0
_SHOWN: Final = frozenset({"pc", "q35-virtio-smp"})


def restores(seed: str, times: int) -> Iterator[str]:
    """Restore each guest so many times in a row; what is said of each time."""
    for parameters in MACHINES:
        if parameters.id in _SHOWN:
            yield from _walker(Random(f"{seed} {parameters.id}"), parameters.values[0], times)
    if (why := lacks()) is not None:
        raise SystemExit(why)
    yield from _linux(Random(f"{seed} linux"), times)


def _walker(rng: Random, scenario: Scenario, times: int) -> Iterator[str]:
    name = " ".join(scenario.machine[:2])
    with _lab() as lab:
        source = lab.source(scenario)
        checkpoint = lab.receive(source, scenario)
        after = source.serial.drain()
        source.qemu.stop()
        for _ in range(times):
            with _lab() as its:
                vm = its.destination(scenario)
                said = _restore(rng, checkpoint, vm.qemu, its.directory())
                vm.qemu.wait_migration()
                its.assert_counts(vm, after, scenario)
            yield f"{name}: {said}"
        checkpoint.verify()


def _linux(rng: Random, times: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="vmferry-soak-") as home:
        place = Path(home)
        with _lab() as lab, QemuProcess(_LINUX.arguments(place)) as qemu:
            shell = Shell(qemu.serial)
            shell.wait_ready(_LONG)
            passes = shell.check()
            arrival = lab.arrival()
            qemu.migrate(
                arrival.address, parameters={"max-bandwidth": 1 << 40, "downtime-limit": 5000}
            )
            arrival.result().close()
            with vmferry.Checkpoint(arrival.directory) as checkpoint:
                for _ in range(times):
                    with QemuProcess([*_LINUX.arguments(place), "-incoming", "defer"]) as there:
                        said = _restore(rng, checkpoint, there, place)
                        there.wait_running()
                        found = Shell(there.serial).check()
                        assert found >= passes, f"{found} passes behind {passes}"
                    yield f"Linux: {said}"
                checkpoint.verify()


def _restore(rng: Random, checkpoint: vmferry.Checkpoint, qemu: QemuProcess, place: Path) -> str:
    options = vmferry.LazyOptions(
        preempt=rng.random() < 0.5, bandwidth=rng.choice([None, None, 16 << 20, 64 << 20])
    )
    learn = rng.random() < 0.5
    uri = f"unix:{place}/restored"
    result = vmferry.Restore(checkpoint, uri, qmp=qemu.qmp, options=options, learn=learn).run()
    assert result.running is not None
    how = [name for name, is_on in (("preempt", options.preempt), ("learn", learn)) if is_on]
    ran, total = result.running * 1e3, result.total * 1e3
    return f"ran after {ran:.1f} ms, whole after {total:.0f}, {result.requests} asked {how}"


@contextmanager
def _lab() -> Iterator[Lab]:
    with (
        tempfile.TemporaryDirectory(prefix="vmferry-soak-") as home,
        ExitStack() as stack,
        Lab(
            lambda *arguments, **more: stack.enter_context(QemuProcess(arguments, **more)),
            Path(home),
        ) as lab,
    ):
        yield lab
