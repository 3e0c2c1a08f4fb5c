"""A saved machine in a QEMU: loaded whole by QEMU itself, or run at once by ``vmferry restore``.

The guest walks over its memory as soon as it runs.  How long its virtual CPU waited for each page
is read off QEMU's own trace of ``postcopy-blocktime``.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import vmferry
from bench.machines import FULL, QUICK, Guest, destination
from bench.measure import Row, Sample, Samples, Target, Unmeasured, milliseconds, quantity, rate
from bench.places import Places
from bench.processes import Process
from bench.processes import vmferry as command
from guests import Serial
from guests.linux import LinuxGuest, Shell, lacks
from vmferry.migration.postcopy.source import quantiles
from vmferry.qemu import QemuProcess
from vmferry.qemu.qmp import Qmp

_GUESTS = (
    Guest("1 GiB", 1024, pages=1 << 17, fill=1 << 17),
    Guest("4 GiB", 4096, pages=4096),
    Guest("16 GiB", 16384, pages=4096),
)
_QUICK = (Guest("64 MiB", 64, pages=4096, fill=4096),)
_CLONE = Guest("clone", 64, pages=1024)
_CLONES = 10
_TIMEOUT = 120.0

_WAIT = re.compile(r"@(\d+\.\d+):mark_postcopy_blocktime_(begin|end) addr: (\w+)")
_TRACE = (
    *("-trace", "mark_postcopy_blocktime_begin", "-trace", "mark_postcopy_blocktime_end"),
    *("-msg", "timestamp=on"),
)


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    for guest in _QUICK if quick else _GUESTS:
        yield from _restores(guest, where.work, rounds)
    yield from _background(QUICK[0] if quick else FULL, where.work, rounds)
    yield from _clones(where.work, rounds)
    if (why := lacks()) is None:
        yield from _linux(
            LinuxGuest(512, 16) if quick else LinuxGuest(2048, 100), where.work, rounds
        )
    else:
        print(f"restore/linux: {why}", file=sys.stderr)


def _saved(guest: Guest | LinuxGuest, work: Path, *, paused: bool = False) -> Path:
    """A checkpoint of the guest, and beside it the same machine as a stream."""
    target = work / "saved"
    shutil.rmtree(target, ignore_errors=True)
    uri = f"unix:{work}/save"
    with QemuProcess(guest.arguments(work)) as qemu:
        if isinstance(guest, LinuxGuest):
            Shell(qemu.serial).wait_ready(_TIMEOUT)
        else:
            Serial(qemu.serial).wait_ready(_TIMEOUT)
        if paused:
            qemu.execute("stop")
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
    what = f"{guest.name}: opening the checkpoint"
    target = Target(5, most=True)
    yield samples.row(f"{name}/open", what, "ms", "first", milliseconds("open"), target)
    what = f"{guest.name}: QEMU loads a file, until the guest runs"
    yield samples.row(f"{name}/QEMU", what, "ms", "QEMU", milliseconds("running"))
    for case, how in (("first", ""), ("preempt", ", preempt"), ("learned", ", working set known")):
        title = f"{guest.name}: vmferry restore{how}"
        target = Target(10, most=True)
        what = f"{title}, from the connection to running"
        yield samples.row(
            f"{name}/{case}/running", what, "ms", case, milliseconds("running"), target
        )
        what = f"{title}, wait of the guest for a page, median"
        target = Target(150, most=True)
        yield samples.row(f"{name}/{case}/wait", what, "µs", case, quantity("wait"), target)
        what = f"{title}, wait of the guest for a page, 99th percentile"
        target = Target(1000, most=True)
        yield samples.row(f"{name}/{case}/waits", what, "µs", case, quantity("waits"), target)
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
    what = f"{guest.name}: the same by vmferry restore, in times as long"
    target = Target(1.2, most=True)
    yield samples.ratio(f"{name}/first/ratio", what, "first", "QEMU", quantity("pass"), target)
    what = f"{guest.name}: the same with its working set known"
    target = Target(1, most=True)
    yield samples.ratio(f"{name}/learned/ratio", what, "learned", "QEMU", quantity("pass"), target)
    what = f"{guest.name}: the share of what it looks at that was there before, working set known"
    figure = quantity("there")
    yield samples.row(f"{name}/there", what, "", "learned", figure, Target(0.9))


def _whole(guest: Guest, work: Path) -> Sample:
    with QemuProcess([*guest.arguments(work), "-incoming", "defer"]) as qemu:
        began, clock = time.time(), time.perf_counter()
        qemu.incoming(f"exec:cat {work}/stream")
        running = _resumed(qemu) - began
        return {"running": running, "pass": _passed(qemu) - clock}


def _lazy(guest: Guest, work: Path, saved: Path, *, learn: bool, preempt: bool = False) -> Sample:
    arguments = [*guest.arguments(work), "-incoming", "defer"]
    began = time.perf_counter()
    with ExitStack() as stack:
        checkpoint = stack.enter_context(vmferry.Checkpoint(saved))
        opened = time.perf_counter() - began
        qemu = stack.enter_context(QemuProcess([*arguments, *_TRACE]))
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
        wait, waits = quantiles(_waits(qemu.stderr()))
        return {
            "open": opened,
            "running": result["time_to_running_ms"] / 1e3,
            "total": result["total_ms"] / 1e3,
            "requests": result["requests"],
            "median": result["fault_service_us"]["median"],
            "p99": result["fault_service_us"]["p99"],
            "wait": wait * 1e6,
            "waits": waits * 1e6,
            "there": 1 - result["requests"] / guest.pages,
            "pass": ended - clock,
        }


def _waits(trace: str) -> list[float]:
    """For how many seconds the guest waited, page by page."""
    began: dict[str, float] = {}
    found = []
    for at, what, address in _WAIT.findall(trace):
        if what == "begin":
            began[address] = float(at)
        elif address in began:
            found.append(float(at) - began.pop(address))
    if not found:
        raise Unmeasured("this QEMU does not trace how long its guest waits")
    return found


def _background(guest: Guest, work: Path, rounds: int) -> Iterator[Row]:
    """All memory of a machine that stands still, which asks for little."""
    saved = _saved(guest, work, paused=True)
    cases = {
        "QEMU": partial(_between_qemus, guest, work),
        "restore": partial(_stands_still, guest, work, saved),
    }
    samples = Samples(cases, rounds)
    what = f"{guest.memory} MiB with content, by postcopy from QEMU to QEMU"
    yield samples.row("restore/background/QEMU", what, "GB/s", "QEMU", rate)
    what = f"{guest.memory} MiB with content, by vmferry restore"
    yield samples.row("restore/background/restore", what, "GB/s", "restore", rate)
    what = f"{guest.memory} MiB with content, by vmferry restore, times as fast"
    yield samples.ratio("restore/background", what, "restore", "QEMU", rate, Target(1))


def _between_qemus(guest: Guest, work: Path) -> Sample:
    uri = f"unix:{work}/between"
    capabilities = ("postcopy-ram", "events")
    with (
        QemuProcess(guest.arguments(work)) as qemu,
        destination(guest, work, uri, capabilities),
    ):
        Serial(qemu.serial).wait_ready(_TIMEOUT)
        qemu.execute("stop")
        qemu.migrate(uri, capabilities=capabilities, parameters={"max-bandwidth": 1 << 20})
        began = None
        while began is None:
            event = qemu.qmp.wait_event("MIGRATION", timeout=_TIMEOUT)
            if event["data"]["status"] == "active":
                qemu.execute("migrate-start-postcopy")
            elif event["data"]["status"] == "postcopy-active":
                began = _stamp(event)
        answer = qemu.wait_migration(timeout=_TIMEOUT)
        while (event := qemu.qmp.wait_event("MIGRATION"))["data"]["status"] != "completed":
            pass
        return {"bytes": answer["ram"]["transferred"], "seconds": _stamp(event) - began}


def _stands_still(guest: Guest, work: Path, saved: Path) -> Sample:
    arguments = [*guest.arguments(work), "-incoming", "defer"]
    with QemuProcess(arguments) as qemu, vmferry.Checkpoint(saved) as checkpoint:
        result = vmferry.Restore(checkpoint, f"unix:{work}/lazy", qmp=qemu.qmp, learn=False).run()
        return {"bytes": result.pages * checkpoint.page_size, "seconds": result.total}


def _resumed(qemu: QemuProcess) -> float:
    return _stamp(qemu.qmp.wait_event("RESUME", timeout=_TIMEOUT))


def _stamp(event: Mapping[str, Any]) -> float:
    """When an event was, in seconds since 1970."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


def _passed(qemu: QemuProcess) -> float:
    """When the guest has ended two passes: the first one it was in the middle of."""
    serial = Serial(qemu.serial)
    serial.wait_beat(timeout=_TIMEOUT)
    serial.wait_beat(timeout=_TIMEOUT)
    return time.perf_counter()


def _clones(work: Path, rounds: int) -> Iterator[Row]:
    """Many machines from one page server at the same time."""
    saved = _saved(_CLONE, work)
    samples = Samples({"clones": partial(_cloned, work, saved)}, rounds)
    name = f"{_CLONES} clones of {_CLONE.memory} MiB at once"
    target = Target(200, most=True)
    for quantity_of, what in (
        ("last", "from the order until the last one runs"),
        ("spread", "from the first one that runs to the last"),
    ):
        title, figure = f"{name}, {what}", milliseconds(quantity_of)
        yield samples.row(f"restore/clones/{quantity_of}", title, "ms", "clones", figure, target)
    what = f"{name}, memory of the server beside the page cache"
    figure = quantity("memory")
    target = Target(100, most=True)
    yield samples.row("restore/clones/memory", what, "MB", "clones", figure, target)


def _cloned(work: Path, saved: Path) -> Sample:
    with ExitStack() as stack:
        path = work / "server"
        server = stack.enter_context(Process(command("serve", str(saved), str(path), "--json")))
        server.event("listening")
        machines = []
        for number in range(_CLONES):
            monitor = f"socket,id=more,path={work}/monitor{number},server=on,wait=off"
            more = ("-chardev", monitor, "-mon", "chardev=more,mode=control")
            arguments = [*_CLONE.arguments(work), "-incoming", "defer", *more]
            machines.append(stack.enter_context(QemuProcess(arguments)))
        sessions = [stack.enter_context(Qmp.connect(str(path))) for _ in machines]

        def order(number: int) -> None:
            uri, monitor = f"unix:{work}/clone{number}", f"{work}/monitor{number}"
            order = {"uri": uri, "qmp": monitor, "working-set": False}
            sessions[number].execute("restore", order)

        began = time.time()
        with ThreadPoolExecutor(_CLONES) as pool:
            list(pool.map(order, range(_CLONES)))
        ran = [_resumed(qemu) for qemu in machines]
        for qemu in machines:
            qemu.wait_migration(timeout=_TIMEOUT)
        memory = server.anonymous() / 1e6
        return {"last": max(ran) - began, "spread": max(ran) - min(ran), "memory": memory}


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
