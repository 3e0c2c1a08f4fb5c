"""Moving a running machine: QEMU to QEMU, vmferry to vmferry, and bytes through a bare socket.

The same memory over the same channel without a limit, in turn.  The machines that are compared for
throughput are paused, so that each migration sends their memory once; those for downtime run.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.machines import EMPTY, FULL, QUICK, Guest, Source, destination, source
from bench.measure import Row, Sample, Samples, Target, milliseconds, pace, quantity
from bench.places import Places
from bench.processes import Process, cpu_of, vmferry, warm_memory
from vmferry.machines.guest.console import Console
from vmferry.qemu.qmp import Qmp

_CHANNELS = (0, 2, 4)
_PAGE = 4096
_TIMEOUT = 120.0
_MOVES = 20

_COPY = """
import socket, sys
family, place = sys.argv[1], sys.argv[2]
sink = socket.socket(socket.AF_UNIX if family == "unix" else socket.AF_INET)
sink.connect(place if family == "unix" else ("127.0.0.1", int(place)))
block, left = bytes(1 << 20), int(sys.argv[3])
while left > 0:
    sink.sendall(block)
    left -= len(block)
sink.shutdown(socket.SHUT_WR)
sink.recv(1)
"""


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    full, empty = QUICK if quick else (FULL, EMPTY)
    yield from _throughput(full, where, rounds, ("unix", "tcp"), quick=quick)
    yield from _throughput(replace(full, preallocated=True), where, rounds, ("unix",), quick=quick)
    yield from _empty(empty, where, rounds, quick=quick)
    yield from _downtime(full, where, 2 if quick else _MOVES)
    yield from _postcopy(full, where, rounds)
    yield from _limited(full, where, rounds)
    yield from _cancel(full, where, rounds)


class Ours:
    """A machine of vmferry in a process of its own; as :class:`bench.machines.Source`."""

    def __init__(self, process: Process, qmp: Qmp) -> None:
        self._process = process
        self._qmp = qmp

    def stop(self) -> None:
        self._qmp.execute("stop")

    def cpu(self) -> float:
        """Seconds of CPU that the process has taken."""
        return self._process.cpu()

    def migrate(self, uri: str, *, channels: int = 0, limit: int = 300) -> Sample:
        """Move the machine, with a downtime limit in milliseconds, and take it back."""
        qmp = self._qmp
        wanted = [{"capability": "multifd", "state": channels > 0}]
        qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        numbers = {"max-bandwidth": 0, "multifd-channels": channels or 2, "downtime-limit": limit}
        qmp.execute("migrate-set-parameters", numbers)
        before = self.cpu()
        qmp.execute("migrate", {"uri": uri})
        answer = _ended(qmp)
        taken = self.cpu() - before
        qmp.execute("cont")  # only a machine that is here can be moved again
        qmp.execute("stop")
        return {
            "seconds": answer["total-time"] / 1e3,
            "bytes": answer["ram"]["transferred"],
            "downtime": answer["downtime"] / 1e3,
            "cpu": taken,
        }

    def postcopy(self, uri: str, other: Ours) -> Sample:
        """Let the machine go to *other* before its memory, in the middle of precopy."""
        self._prepare(uri, other, "postcopy-ram")
        self._qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 0})
        self._qmp.execute("migrate", {"uri": uri})
        while self._qmp.execute("query-migrate").get("ram", {}).get("dirty-sync-count", 0) < 3:
            time.sleep(0.01)
        self._qmp.execute("migrate-start-postcopy")
        return {"downtime": _ended(self._qmp)["downtime"] / 1e3}

    def _prepare(self, uri: str, other: Ours, *capabilities: str) -> None:
        """Have *other* wait at *uri*, with these on both sides."""
        states = [{"capability": name, "state": True} for name in capabilities]
        for side in (self._qmp, other._qmp):
            side.execute("migrate-set-capabilities", {"capabilities": states})
        other._qmp.execute("migrate-incoming", {"uri": uri})

    def with_disk(self, uri: str, other: Ours) -> Sample:
        """Move the machine and its disk to *other*; ``anonymous`` is what the larger side took."""
        self._prepare(uri, other, "block", "zero-blocks")
        self._qmp.execute("migrate-set-parameters", {"max-bandwidth": 0})
        before = self.anonymous(), other.anonymous()
        most = 0.0
        self._qmp.execute("migrate", {"uri": uri})
        while True:
            after = self.anonymous(), other.anonymous()
            most = max(most, *(now - then for now, then in zip(after, before, strict=True)))
            if self._qmp.execute("query-migrate")["status"] in {"completed", "failed"}:
                break
            time.sleep(0.05)
        answer = _ended(self._qmp)
        return {
            "seconds": answer["total-time"] / 1e3,
            "downtime": answer["downtime"] / 1e3,
            "anonymous": most,
        }

    def limited(self, uri: str, limit: int) -> tuple[float, float]:
        """Move the machine at *limit* bytes a second; the least and the most within any second."""
        qmp = self._qmp
        qmp.execute("migrate-set-parameters", {"max-bandwidth": limit})
        qmp.execute("migrate", {"uri": uri})
        seen: list[tuple[float, int]] = []
        while (now := qmp.execute("query-migrate"))["status"] in {"setup", "active"}:
            if "ram" in now:
                seen.append((time.perf_counter(), now["ram"]["transferred"]))
            time.sleep(0.01)
        rates = []
        for start, (began, before) in enumerate(seen):
            following = ((at, sent) for at, sent in seen[start:] if at - began >= 1)
            if (end := next(following, None)) is not None:
                rates.append((end[1] - before) / (end[0] - began))
        return min(rates), max(rates)

    def cancel(self, uri: str) -> float:
        """Begin to move the machine and think better of it; how many seconds that took."""
        qmp = self._qmp
        qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 26})
        qmp.execute("migrate", {"uri": uri})
        while qmp.execute("query-migrate")["status"] != "active":
            time.sleep(0.01)
        began = time.perf_counter()
        qmp.execute("migrate_cancel")
        while qmp.execute("query-migrate")["status"] != "cancelled":
            time.sleep(0.001)
        return time.perf_counter() - began

    def anonymous(self) -> float:
        """Bytes of memory of the process that are not the guest's (``RssAnon``)."""
        return self._process.anonymous()


def _ended(qmp: Qmp) -> dict[str, float]:
    """``query-migrate`` once it says how the migration has ended."""
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        answer = qmp.execute("query-migrate")
        if answer["status"] == "completed":
            return dict(answer)
        if answer["status"] in {"failed", "cancelled"}:
            raise RuntimeError(f"{answer['status']}: {answer.get('error-desc')}")
        time.sleep(0.01)
    raise TimeoutError("the migration does not end")


@contextmanager
def ours(
    guest: Guest,
    where: Path,
    name: str,
    *,
    rate: int | None = 1,
    uri: str = "",
    disk: Path | None = None,
) -> Iterator[Ours]:
    """A machine with the guest's memory, which its own guest has filled; or one that waits.

    Its *disk* is its own.
    """
    ram = guest.memory << 20
    working = max(guest.fill, guest.pages) * _PAGE
    lines = [
        f"ram = {ram}",
        f"preallocate = {str(guest.preallocated).lower()}",
        "[guest]",
        f"working-set = {working}",
        'rate = "unlimited"' if rate is None else f"rate = {rate}",
    ]
    if disk is not None:
        lines += ["[[disk]]", f'file = "{disk}"', "[ownership]", 'store = "none"']
    (where / f"{name}.toml").write_text("\n".join(lines))
    options = ["--incoming", uri] if uri else []
    monitor, serial = where / f"{name}.qmp", where / f"{name}.serial"
    command = vmferry(
        "run", str(where / f"{name}.toml"), "--qmp", str(monitor), "--serial", str(serial)
    )
    with ExitStack() as stack:
        process = stack.enter_context(Process([*command, "--json", *options]))
        qmp = stack.enter_context(_connected(monitor))
        if not uri:
            _await_filled(serial)
        yield Ours(process, qmp)


def _connected(monitor: Path) -> Qmp:
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            return Qmp.connect(str(monitor), timeout=_TIMEOUT)
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _await_filled(serial: Path) -> None:
    """Wait for a heartbeat of a guest that has written all of its working set."""
    deadline = time.monotonic() + _TIMEOUT
    console = Console()
    while not serial.exists():
        time.sleep(0.02)
    with serial.open("rb") as output:
        while not (console.beats and console.beats[-1].filled):
            if time.monotonic() > deadline:
                raise TimeoutError("the guest does not fill its memory")
            time.sleep(0.02)
            console.feed(output.read())


# Cases


def _to_ours(
    machine: Ours, guest: Guest, where: Path, uri: str, channels: int, limit: int = 300
) -> Sample:
    with ours(guest, where, "there", uri=uri) as other:
        before = other.cpu()
        sample = machine.migrate(uri, channels=channels, limit=limit)
        return {**sample, "there": other.cpu() - before}


def _to_qemu(qemu: Source, guest: Guest, where: Path, uri: str, channels: int) -> Sample:
    capabilities = ("return-path", *(("multifd",) if channels else ()))
    with destination(guest, where, uri, capabilities, channels=channels or 2) as other:
        before, there = qemu.cpu(), cpu_of(other.pid)
        sample = qemu.migrate(uri, capabilities=capabilities, channels=channels or 2)
        return {**sample, "cpu": qemu.cpu() - before, "there": cpu_of(other.pid) - there}


def _bare(kind: str, where: Path, size: int) -> Sample:
    """A process sends *size* bytes in pieces of 1 MiB to another one, which reads as much."""
    path = where / "bare"
    path.unlink(missing_ok=True)
    family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(path) if kind == "unix" else ("127.0.0.1", 0))
        listener.listen()
        place = str(path) if kind == "unix" else str(listener.getsockname()[1])
        sender = subprocess.Popen([sys.executable, "-c", _COPY, kind, place, str(size)])
        connection, _ = listener.accept()
        buffer = memoryview(bytearray(1 << 20))
        began = time.perf_counter()
        with connection:
            while connection.recv_into(buffer):
                pass
        seconds = time.perf_counter() - began
        sender.wait()
    return {"seconds": seconds, "bytes": size}


# Rows


def _throughput(
    guest: Guest, where: Places, rounds: int, kinds: Sequence[str], *, quick: bool
) -> Iterator[Row]:
    work = where.work
    uris = {"unix": f"unix:{work}/live", "tcp": "tcp:127.0.0.1:47123"}
    with source(guest, work) as qemu, ours(guest, work, "here") as machine:
        machine.stop()
        for kind in kinds:
            uri = uris[kind]
            cases: dict[str, Callable[[], Sample]] = {
                "bare": partial(_bare, kind, work, max(guest.fill, 1) * _PAGE)
            }
            for count in _CHANNELS:
                cases[f"QEMU {count}"] = partial(_to_qemu, qemu, guest, work, uri, count)
                cases[f"vmferry {count}"] = partial(_to_ours, machine, guest, work, uri, count)
            samples = Samples(cases, rounds, before=None if quick else warm_memory)
            title = f"{kind}, memory preallocated" if guest.preallocated else kind
            yield from _of_channel(title, guest, samples)


def _of_channel(kind: str, guest: Guest, samples: Samples) -> Iterator[Row]:
    size = guest.memory / 1024
    yield samples.row(f"live/{kind}/bare", f"{kind}: a bare socket", "GB/s", "bare", _memory(guest))
    for count in _CHANNELS:
        title = f"{kind}: " + (f"{count} multifd channels" if count else "one channel")
        for who in ("QEMU", "vmferry"):
            case, name = f"{who} {count}", f"live/{kind}/{count}/{who}"
            what = f"{title}, {who} → {who}"
            yield samples.row(name, what, "GB/s", case, _memory(guest))
            cpu = f"{what}, CPU of both"
            yield samples.row(f"{name}/cpu", cpu, "s/GiB", case, partial(_cpu, size))
        pair = (f"vmferry {count}", f"QEMU {count}")
        target = Target(1.5 if count else 3)
        what = f"{title}, vmferry, times as fast as QEMU"
        yield samples.ratio(f"live/{kind}/{count}/ratio", what, *pair, pace, target)
    what = f"{kind}: one channel, vmferry, of what a bare socket copies"
    yield samples.ratio(f"live/{kind}/socket", what, "vmferry 0", "bare", pace, Target(0.7))


def _empty(guest: Guest, where: Places, rounds: int, *, quick: bool) -> Iterator[Row]:
    work, uri = where.work, f"unix:{where.work}/live"
    with source(guest, work) as qemu, ours(guest, work, "here") as machine:
        machine.stop()
        cases = {
            "QEMU": partial(_to_qemu, qemu, guest, work, uri, 0),
            "vmferry": partial(_to_ours, machine, guest, work, uri, 0),
        }
        samples = Samples(cases, rounds, before=None if quick else warm_memory)
    for case in cases:
        what = f"{guest.memory} MiB, mostly zero: {case} → {case}"
        yield samples.row(f"live/empty/{case}", what, "ms", case, milliseconds("seconds"))
    what = f"{guest.memory} MiB, mostly zero: vmferry, times as fast as QEMU"
    yield samples.ratio("live/empty/ratio", what, "vmferry", "QEMU", pace, Target(3))


def _downtime(guest: Guest, where: Places, moves: int) -> Iterator[Row]:
    """Machines that run: one that hardly writes, and one that writes 200 MB/s."""
    work, uri = where.work, f"unix:{where.work}/live"

    def move(rate: int, limit: int) -> Sample:
        with ours(guest, work, "here", rate=rate) as machine:
            return _to_ours(machine, guest, work, uri, 0, limit)

    with source(guest, work) as qemu:

        def move_qemu() -> Sample:
            with destination(guest, work, uri, ("return-path",)):
                return qemu.migrate(uri, capabilities=("return-path",), running=True)

        cases = {
            "QEMU": move_qemu,
            "idle": lambda: move(1, 300),
            "writing": lambda: move(200_000_000 // _PAGE, 100),
        }
        samples = Samples(cases, moves)
    figure, size = milliseconds("downtime"), f"{guest.memory} MiB"
    what = f"{size}, hardly writing: QEMU → QEMU, downtime"
    yield samples.row("live/downtime/QEMU", what, "ms", "QEMU", figure)
    what = f"{size}, hardly writing: vmferry → vmferry, downtime"
    target = Target(5, most=True)
    yield samples.row("live/downtime/idle", what, "ms", "idle", figure, target)
    what = f"{size}, writing 200 MB/s, limit 100 ms: downtime, median of {moves}"
    yield samples.row("live/downtime/writing", what, "ms", "writing", figure)
    what = f"{size}, writing 200 MB/s, limit 100 ms: moves within the limit"
    within = [float(value <= 100) for value in samples.values("writing", figure)]
    share = [sum(within) / len(within) * 100] if within else []
    yield Row("live/downtime/within", what, "%", share, Target(100))


def _postcopy(guest: Guest, where: Places, rounds: int) -> Iterator[Row]:
    """A machine that writes as fast as it can goes before its memory."""
    work = where.work

    def move() -> Sample:
        with (
            ours(guest, work, "here", rate=None) as machine,
            ours(guest, work, "there", uri="defer") as other,
        ):
            return machine.postcopy(f"unix:{work}/live", other)

    samples = Samples({"postcopy": move}, rounds)
    what = f"{guest.memory} MiB, written to all the time, by postcopy: downtime"
    target = Target(20, most=True)
    figure = milliseconds("downtime")
    yield samples.row("live/postcopy/downtime", what, "ms", "postcopy", figure, target)


def _limited(guest: Guest, where: Places, rounds: int) -> Iterator[Row]:
    """How well a limit is held, over every second of a migration."""
    work, uri = where.work, f"unix:{where.work}/live"
    limit = guest.fill * _PAGE // 4

    def limited() -> Sample:
        with ours(guest, work, "here") as machine, ours(guest, work, "there", uri=uri):
            machine.stop()
            least, most = machine.limited(uri, limit)
            return {"least": least / limit, "most": most / limit}

    samples = Samples({"limited": limited}, rounds)
    what = f"a limit of {limit / 1e6:.0f} MB/s: the most within any second, of the limit"
    target = Target(1.05, most=True)
    yield samples.row("live/limit/most", what, "", "limited", quantity("most"), target)
    what = "the same: the least within any second, of the limit"
    yield samples.row("live/limit/least", what, "", "limited", quantity("least"), Target(0.95))


def _cancel(guest: Guest, where: Places, rounds: int) -> Iterator[Row]:
    """A migration that is cancelled, and what the processes take beside the guest's memory."""
    work, uri = where.work, f"unix:{where.work}/live"

    def cancel() -> Sample:
        with ours(guest, work, "here") as machine, ours(guest, work, "there", uri=uri) as other:
            seconds = machine.cancel(uri)
            return {"seconds": seconds, "peak": max(machine.anonymous(), other.anonymous())}

    samples = Samples({"cancel": cancel}, rounds)
    what, figure = "a cancel, until the status is cancelled", milliseconds("seconds")
    yield samples.row("live/cancel", what, "ms", "cancel", figure, Target(50, most=True))
    what = "memory of a process beside the guest's, while it moves"
    target = Target(100, most=True)
    yield samples.row("live/memory", what, "MB", "cancel", lambda s: s["peak"] / 1e6, target)


def _memory(guest: Guest) -> Callable[[Sample], float]:
    """GB of guest memory a second."""
    size = guest.fill * _PAGE
    return lambda sample: size / sample["seconds"] / 1e9


def _cpu(size: float, sample: Sample) -> float:
    return (sample["cpu"] + sample["there"]) / size
