"""A saved machine in a QEMU: loaded whole by QEMU itself, or run at once by ``vmferry restore``.

The guest walks over its memory as soon as it runs.  Latencies are as QEMU counts them: how long its
virtual CPU stood still (``postcopy-blocktime``), by how many pages it asked for.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import vmferry
from bench.machines import Guest
from bench.measure import Row, Sample, Samples, Target, milliseconds
from bench.places import Places
from bench.processes import Process
from bench.processes import vmferry as command
from guests import Serial
from guests.linux import LinuxGuest, Shell, lacks
from vmferry.qemu import QemuProcess

_GUESTS = (
    Guest("1 GiB", 1024, pages=1 << 17, fill=1 << 17),
    Guest("4 GiB", 4096, pages=4096),
    Guest("16 GiB", 16384, pages=4096),
)
_QUICK = (Guest("64 MiB", 64, pages=4096, fill=4096),)
_CLONE = Guest("clone", 64, pages=1024)
_CLONES = 10
_TIMEOUT = 120.0


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    for guest in _QUICK if quick else _GUESTS:
        yield from _restores(guest, where.work, rounds)
    yield from _clones(where.work, rounds)
    if (why := lacks()) is None:
        yield from _linux(
            LinuxGuest(512, 16) if quick else LinuxGuest(2048, 100), where.work, rounds
        )
    else:
        print(f"restore/linux: {why}", file=sys.stderr)


def _saved(guest: Guest | LinuxGuest, work: Path) -> Path:
    """A checkpoint of the guest, and beside it the same machine as a stream."""
    target = work / "saved"
    shutil.rmtree(target, ignore_errors=True)
    uri = f"unix:{work}/save"
    with QemuProcess(guest.arguments(work)) as qemu:
        if isinstance(guest, LinuxGuest):
            Shell(qemu.serial).wait_ready(_TIMEOUT)
        else:
            Serial(qemu.serial).wait_ready(_TIMEOUT)
        with Process(command("receive", uri, str(target), "--json")) as receiver:
            receiver.event("listening")
            qemu.migrate(uri, parameters={"max-bandwidth": 1 << 40, "downtime-limit": 10_000})
            receiver.event("result")
    (work / "stream").unlink(missing_ok=True)
    vmferry.send(target, f"file:{work}/stream")
    return target


def _cases(
    whole: Callable[[], Sample], lazy: Callable[..., Sample]
) -> dict[str, Callable[[], Sample]]:
    """QEMU's own load, and the ways to restore."""
    return {
        "QEMU": whole,
        "first": partial(lazy, learn=False),
        "preempt": partial(lazy, learn=False, preempt=True),
        "learned": partial(lazy, learn=True),
    }


def _restores(guest: Guest, work: Path, rounds: int) -> Iterator[Row]:
    saved = _saved(guest, work)
    lazy = partial(_lazy, guest, work, saved)
    samples = Samples(_cases(partial(_whole, guest, work), lazy), rounds)
    name = f"restore/{guest.name}"
    what = f"{guest.name}: QEMU loads a file, until the guest runs"
    yield samples.row(f"{name}/QEMU", what, "ms", "QEMU", milliseconds("running"))
    for case, how in (("first", ""), ("preempt", ", preempt"), ("learned", ", working set known")):
        title = f"{guest.name}: vmferry restore{how}"
        target = Target(10, most=True)
        what = f"{title}, from the connection to running"
        yield samples.row(
            f"{name}/{case}/running", what, "ms", case, milliseconds("running"), target
        )
        what = f"{title}, mean wait of the guest for a page"
        yield samples.row(f"{name}/{case}/wait", what, "µs", case, lambda s: s["wait"] * 1e6)
        what = f"{title}, request read to page written, median"
        target = Target(40, most=True)
        yield samples.row(f"{name}/{case}/median", what, "µs", case, lambda s: s["median"], target)
        what = f"{title}, request read to page written, 99th percentile"
        yield samples.row(f"{name}/{case}/p99", what, "µs", case, lambda s: s["p99"])
        what = f"{title}, requests"
        yield samples.row(f"{name}/{case}/requests", what, "", case, lambda s: s["requests"])
        what = f"{title}, until the guest has looked at all of its memory"
        yield samples.row(f"{name}/{case}/pass", what, "ms", case, milliseconds("pass"))
        what = f"{title}, until all is there"
        yield samples.row(f"{name}/{case}/total", what, "ms", case, milliseconds("total"))
    what = f"{guest.name}: QEMU loads a file, until the guest has looked at all of its memory"
    yield samples.row(f"{name}/QEMU/pass", what, "ms", "QEMU", milliseconds("pass"))


def _whole(guest: Guest, work: Path) -> Sample:
    with QemuProcess([*guest.arguments(work), "-incoming", "defer"]) as qemu:
        began, clock = time.time(), time.perf_counter()
        qemu.incoming(f"exec:cat {work}/stream")
        running = _resumed(qemu) - began
        return {"running": running, "pass": _passed(qemu) - clock}


def _lazy(guest: Guest, work: Path, saved: Path, *, learn: bool, preempt: bool = False) -> Sample:
    arguments = [*guest.arguments(work), "-incoming", "defer"]
    with QemuProcess(arguments) as qemu, vmferry.Checkpoint(saved) as checkpoint:
        qemu.prepare_migration(["postcopy-blocktime"])
        options = vmferry.LazyOptions(preempt=preempt)
        restore = vmferry.Restore(
            checkpoint, f"unix:{work}/lazy", qmp=qemu.qmp, options=options, learn=learn
        )
        clock = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            passed = pool.submit(_passed, qemu)
            result = restore.run().to_json()
            ended = passed.result()
        wait = qemu.wait_migration().get("postcopy-blocktime", 0) / 1e3
        return {
            "running": result["time_to_running_ms"] / 1e3,
            "total": result["total_ms"] / 1e3,
            "requests": result["requests"],
            "median": result["fault_service_us"]["median"],
            "p99": result["fault_service_us"]["p99"],
            "wait": wait / max(result["requests"], 1),
            "pass": ended - clock,
        }


def _resumed(qemu: QemuProcess) -> float:
    stamp = qemu.qmp.wait_event("RESUME", timeout=_TIMEOUT)["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def _passed(qemu: QemuProcess) -> float:
    """When the guest has ended two passes: the first one it was in the middle of."""
    serial = Serial(qemu.serial)
    serial.wait_beat(timeout=_TIMEOUT)
    serial.wait_beat(timeout=_TIMEOUT)
    return time.perf_counter()


def _clones(work: Path, rounds: int) -> Iterator[Row]:
    """Many machines from one checkpoint at the same time."""
    saved = _saved(_CLONE, work)

    def clones() -> Sample:
        with ExitStack() as stack:
            checkpoint = stack.enter_context(vmferry.Checkpoint(saved))
            arguments: Sequence[str] = [*_CLONE.arguments(work), "-incoming", "defer"]
            machines = [stack.enter_context(QemuProcess(arguments)) for _ in range(_CLONES)]
            restores = [
                vmferry.Restore(checkpoint, f"unix:{work}/clone{n}", qmp=qemu.qmp, learn=False)
                for n, qemu in enumerate(machines)
            ]
            began = time.time()
            with ThreadPoolExecutor(_CLONES) as pool:
                return {"seconds": max(pool.map(_ran_at, restores)) - began}

    samples = Samples({"clones": clones}, rounds)
    what = f"{_CLONES} clones of {_CLONE.memory} MiB at once, until the last one runs"
    yield samples.row(
        "restore/clones", what, "ms", "clones", milliseconds("seconds"), Target(200, most=True)
    )


def _ran_at(restore: vmferry.Restore) -> float:
    result = restore.run()
    return time.time() - result.total + (result.running or 0.0)


def _linux(guest: LinuxGuest, work: Path, rounds: int) -> Iterator[Row]:
    """What a person feels: when the shell of a Linux answers."""
    saved = _saved(guest, work)
    lazy = partial(_linux_lazy, guest, work, saved)
    samples = Samples(_cases(partial(_linux_whole, guest, work), lazy), rounds)
    name = f"Linux, {guest.memory} MiB"
    what = f"{name}: QEMU loads a file, until the shell answers"
    yield samples.row("restore/linux/QEMU", what, "ms", "QEMU", milliseconds("answer"))
    for case, how, most in (
        ("first", "", 120),
        ("preempt", ", preempt", 120),
        ("learned", ", working set known", 50),
    ):
        what = f"{name}: vmferry restore{how}, until the shell answers"
        yield samples.row(
            f"restore/linux/{case}",
            what,
            "ms",
            case,
            milliseconds("answer"),
            Target(most, most=True),
        )
        what = f"{name}: vmferry restore{how}, until all is there"
        yield samples.row(f"restore/linux/{case}/total", what, "ms", case, milliseconds("total"))


def _linux_whole(guest: LinuxGuest, work: Path) -> Sample:
    with QemuProcess([*guest.arguments(work), "-incoming", "defer"]) as qemu:
        clock = time.perf_counter()
        qemu.incoming(f"exec:cat {work}/stream")
        return {"answer": _answered(qemu) - clock}


def _linux_lazy(
    guest: LinuxGuest, work: Path, saved: Path, *, learn: bool, preempt: bool = False
) -> Sample:
    arguments = [*guest.arguments(work), "-incoming", "defer"]
    with QemuProcess(arguments) as qemu, vmferry.Checkpoint(saved) as checkpoint:
        options = vmferry.LazyOptions(preempt=preempt)
        restore = vmferry.Restore(
            checkpoint, f"unix:{work}/lazy", qmp=qemu.qmp, options=options, learn=learn
        )
        clock = time.perf_counter()
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(_answered, qemu)
            total = restore.run().total
            return {"answer": answered.result() - clock, "total": total}


def _answered(qemu: QemuProcess) -> float:
    """When the shell has answered; what is typed before the machine runs is lost."""
    qemu.wait_running(_TIMEOUT)
    Shell(qemu.serial).run("true", _TIMEOUT)
    return time.perf_counter()
