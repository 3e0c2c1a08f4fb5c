"""Sending: vmferry and QEMU send the same guest to the same destinations."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from bench.machines import EMPTY, FULL, QUICK, Guest, Source, destination, loaded, source
from bench.measure import Row, Sample, Samples, Target, milliseconds, pace, rate
from bench.places import Places
from bench.processes import Process, vmferry, warm_memory
from bench.receive import RETURN_PATH, to_cat, to_qemu


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    for guest in QUICK if quick else (FULL, EMPTY):
        with source(guest, where.work) as qemu:
            checkpoint = received(qemu, where.work / f"sent-{guest.name}")
            yield from _rows(guest, qemu, checkpoint, where, rounds, quick=quick)


def received(qemu: Source, target: Path) -> Path:
    """The guest as a checkpoint."""
    uri = f"unix:{target}.socket"
    with Process(vmferry("receive", uri, str(target), "--json")) as receiver:
        receiver.event("listening")
        qemu.migrate(uri)
        receiver.event("result")
        receiver.wait()
    return target


def from_vmferry(checkpoint: Path, uri: str) -> Sample:
    """``vmferry send``: seconds from its connection on, ``bytes``; ``started`` with the process."""
    started = time.perf_counter()
    with Process(vmferry("send", str(checkpoint), uri, "--json")) as sender:
        result = sender.event("result")
        used = sender.wait()
    sample = {"seconds": result["elapsed"], "bytes": result["transferred"], "started": started}
    return {**sample, "cpu": used["cpu"]}


def to_destination(checkpoint: Path, guest: Guest, where: Places) -> Sample:
    """vmferry to QEMU; ``done`` is when that has loaded the machine, ``seconds`` when we heard."""
    uri = f"unix:{where.work / 'destination'}"
    with destination(guest, where.work, uri) as other:
        sample = from_vmferry(checkpoint, uri)
        return {**sample, "done": loaded(other) - sample["started"]}


def _rows(
    guest: Guest, qemu: Source, checkpoint: Path, where: Places, rounds: int, *, quick: bool
) -> Iterator[Row]:
    samples = Samples(
        {
            "QEMU → QEMU": lambda: to_qemu(qemu, guest, where, RETURN_PATH),
            "vmferry → QEMU": lambda: to_destination(checkpoint, guest, where),
            "QEMU → cat": lambda: to_cat(qemu),
            "vmferry → cat": lambda: from_vmferry(checkpoint, "exec:cat >/dev/null"),
            "vmferry → /dev/null": lambda: from_vmferry(checkpoint, "file:/dev/null"),
        },
        rounds,
        before=None if quick else warm_memory,
    )
    yield from _to_qemu(guest, samples)
    yield from _to_nothing(guest, samples)


def _to_qemu(guest: Guest, samples: Samples) -> Iterator[Row]:
    name = f"send/{guest.name}"
    for case in ("QEMU → QEMU", "vmferry → QEMU"):
        what = f"{guest.name}: {case}, until it has loaded"
        yield samples.row(f"{name}/{case}", what, "ms", case, milliseconds("seconds"))
    what = f"{guest.name}: vmferry → QEMU, from the start of the command on"
    yield samples.row(f"{name}/command", what, "ms", "vmferry → QEMU", milliseconds("done"))
    what = f"{guest.name}: vmferry → QEMU, times as fast as QEMU → QEMU"
    cases = ("vmferry → QEMU", "QEMU → QEMU")
    yield samples.ratio(f"{name}/QEMU", what, *cases, pace, Target(1))


def _to_nothing(guest: Guest, samples: Samples) -> Iterator[Row]:
    name = f"send/{guest.name}"
    for case in ("QEMU → cat", "vmferry → cat", "vmferry → /dev/null"):
        what = f"{guest.name}: {case}"
        yield samples.row(f"{name}/{case}", what, "ms", case, milliseconds("seconds"))
        if guest.fill:  # of a guest of zeros hardly a byte is sent: its rate says nothing
            target = Target(2.5) if case == "vmferry → /dev/null" else None
            yield samples.row(f"{name}/{case}/rate", what, "GB/s", case, rate, target)
    what = f"{guest.name}: vmferry → /dev/null, times as fast as QEMU → cat"
    cases = ("vmferry → /dev/null", "QEMU → cat")
    yield samples.ratio(f"{name}/cat", what, *cases, pace, Target(3))
