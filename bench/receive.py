"""Receiving: QEMU sends to vmferry, to another QEMU, and into ``cat >/dev/null``.

The guest is paused, so each migration sends its memory once.  Times are QEMU's own ``total-time``
where nothing else is said.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from bench.machines import EMPTY, FULL, QUICK, Guest, Source, destination, loaded, source
from bench.measure import Row, Sample, Samples, Target, milliseconds, pace, rate
from bench.places import Places, file_system
from bench.processes import Process, vmferry, warm_memory

VARIANTS = {"": (), " with return-path": ("return-path",), " with multifd": ("multifd",)}
RETURN_PATH = VARIANTS[" with return-path"]


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    for guest in QUICK if quick else (FULL, EMPTY):
        with source(guest, where.work) as qemu:
            yield from _rows(guest, qemu, where, rounds, quick=quick)


def to_cat(qemu: Source) -> Sample:
    """QEMU's own speed, into a pipe."""
    return qemu.migrate("exec:cat >/dev/null")


def to_qemu(qemu: Source, guest: Guest, where: Places, capabilities: Sequence[str] = ()) -> Sample:
    """QEMU to QEMU; ``done`` is when the destination has loaded the machine."""
    uri = f"unix:{where.work / 'destination'}"
    with destination(guest, where.work, uri, capabilities) as other:
        sample = qemu.migrate(uri, capabilities=capabilities)
        return {**sample, "done": loaded(other) - sample["started"]}


def to_vmferry(
    qemu: Source, socket: Path, target: Path, capabilities: Sequence[str] = ()
) -> Sample:
    """QEMU to ``vmferry receive``; ``done`` is when the checkpoint is complete."""
    shutil.rmtree(target, ignore_errors=True)
    uri = f"unix:{socket}"
    with Process(vmferry("receive", uri, str(target), "--json")) as receiver:
        receiver.event("listening")
        sample = qemu.migrate(uri, capabilities=capabilities)
        receiver.event("result")
        done = time.perf_counter() - sample["started"]
        used = receiver.wait()
    return {**sample, "done": done, "cpu": used["cpu"], "peak": used["peak"]}


def _rows(guest: Guest, qemu: Source, where: Places, rounds: int, *, quick: bool) -> Iterator[Row]:
    disks = {file_system(p): p for p in (where.memory, where.disk) if p}
    cases: dict[str, Callable[[], Sample]] = {"cat": partial(to_cat, qemu)}
    for variant, capabilities in VARIANTS.items():
        cases[f"QEMU{variant}"] = partial(to_qemu, qemu, guest, where, capabilities)
        for disk, path in disks.items():
            receiver = partial(to_vmferry, qemu, where.work / "socket", path / "received")
            cases[disk + variant] = partial(receiver, capabilities)
    samples = Samples(cases, rounds, before=None if quick else warm_memory)
    yield from _own(guest, samples)
    for disk in disks:
        yield from _of_disk(guest, samples, disk)
    for path in disks.values():
        shutil.rmtree(path / "received", ignore_errors=True)


def _own(guest: Guest, samples: Samples) -> Iterator[Row]:
    """QEMU by itself."""
    name = f"receive/{guest.name}"
    time_of = milliseconds("seconds")
    yield samples.row(f"{name}/cat", f"{guest.name}: QEMU → cat", "ms", "cat", time_of)
    if guest.fill:  # of a guest of zeros hardly a byte is sent: its rate says nothing
        yield samples.row(f"{name}/cat/rate", f"{guest.name}: QEMU → cat", "GB/s", "cat", rate)
    for variant in VARIANTS:
        case = f"QEMU{variant}"
        what = f"{guest.name}: QEMU → QEMU{variant}"
        yield samples.row(f"{name}/{case}", what, "ms", case, time_of)


def _of_disk(guest: Guest, samples: Samples, disk: str) -> Iterator[Row]:
    """What is received into one file system."""
    name, what = f"receive/{guest.name}/{disk}", f"{guest.name}: QEMU → vmferry on {disk}"
    for variant in VARIANTS:
        case, title = disk + variant, what + variant
        yield samples.row(f"{name}{variant}", title, "ms", case, milliseconds("seconds"))
        done = f"{title}, until the checkpoint is complete"
        yield samples.row(f"{name}{variant}/complete", done, "ms", case, milliseconds("done"))
    if guest.fill:
        yield samples.row(f"{name}/rate", what, "GB/s", disk, rate)
    yield samples.row(f"{name}/cpu", f"{what}, CPU time", "ms", disk, milliseconds("cpu"))
    yield samples.row(f"{name}/peak", f"{what}, memory at most", "MB", disk, megabytes)
    for other, variant, target in (
        ("cat", "", 0.95),
        ("QEMU", "", 1),
        ("QEMU with return-path", " with return-path", 1),
    ):
        title = f"{what}{variant}, times as fast as into {other}"
        case = disk + variant
        yield samples.ratio(f"{name}/{other}", title, case, other, pace, Target(target))


def megabytes(sample: Sample) -> float:
    """The peak of a sample's memory."""
    return sample["peak"] / 1e6
