"""Dirty logs: what a look at 1 GiB costs, and what being logged costs those who write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt

from bench.measure import Row, Sample, Samples, Target, Unmeasured, milliseconds, quantity
from bench.places import Places
from vmferry.machines import GuestConfig, HostedMachine, MachineConfig, create
from vmferry.machines.guest.console import Console
from vmferry.memory import DirtyLog, GuestMemory, MemoryBlock, open_dirty_log

_PAGE = 4096
_SIZE = 1 << 30
_QUICK = 64 << 20
_DIRTY = 26_000
_QUICK_DIRTY = 1_000
_INTERVAL = 0.1
"""Seconds between two looks while a guest runs."""

_LOOKS = 15


def rows(_where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    size, dirty = (_QUICK, _QUICK_DIRTY) if quick else (_SIZE, _DIRTY)
    for kind in ("userfaultfd", "shadow"):
        with ExitStack() as stack:
            work = stack.enter_context(_Memory(kind, size, dirty))
            samples = Samples(
                {"idle": work.idle, "dirty": work.dirty, "unlogged": work.unlogged}, rounds
            )
            yield from _looks(kind, samples, dirty)
            if kind == "userfaultfd":
                what = "first write to a page after a look"
                yield samples.row("dirty/write", what, "µs", "dirty", quantity("write"))
                what = "write to a page that is not logged"
                yield samples.row("dirty/unlogged", what, "µs", "unlogged", quantity("write"))
    with _Guest(size, dirty) as guest:
        samples = Samples(guest.cases(), rounds)
        yield from _looks("kvm", samples, dirty)
        for case in ("none", "kvm", "userfaultfd"):
            what = f"pages that a guest on KVM rewrites, log: {case}"
            yield samples.row(f"dirty/guest/{case}", what, "1000/s", case, quantity("pages"))
        what = "times as many with kvm as with userfaultfd"
        yield samples.ratio("dirty/guest", what, "kvm", "userfaultfd", quantity("pages"), Target(1))


def _looks(kind: str, samples: Samples, dirty: int) -> Iterator[Row]:
    idle, busy = (Target(1, most=True), Target(4, most=True)) if kind != "shadow" else (None, None)
    cases = (("idle", "nothing written", idle), ("dirty", f"{dirty} pages written", busy))
    for case, what, target in cases:
        name = f"dirty/{kind}/{case}"
        yield samples.row(name, f"{kind}: {what}", "ms", case, milliseconds("seconds"), target)


class _Look:
    """A log of a block, which is looked at."""

    def __init__(self, log: DirtyLog, block: MemoryBlock) -> None:
        self._log = log
        self._block = block
        self._words = np.zeros(block.pages // 64, np.uint64)

    def __call__(self, least: int = 0) -> float:
        """Seconds; *least* pages have to be found."""
        start = time.perf_counter()
        found = self._log.collect(self._block, self._words)
        seconds = time.perf_counter() - start
        if found < least:
            raise Unmeasured(f"expected {least} pages or more, found {found}")
        return seconds


class _Memory:
    """Memory that this process writes itself."""

    def __init__(self, kind: str, size: int, dirty: int) -> None:
        self._kind = kind
        self._size = size
        self._count = dirty

    def __enter__(self) -> _Memory:
        with ExitStack() as stack:
            memory = stack.enter_context(GuestMemory())
            block = memory.add("ram", self._size)
            block.array[::_PAGE] = 1
            self._bytes: npt.NDArray[np.uint8] = block.array
            pages = np.random.default_rng(1).permutation(block.pages)[: self._count]
            self._where = pages * _PAGE
            log = open_dirty_log(memory, self._kind)
            log.start()
            stack.callback(log.stop)
            self._look = _Look(log, block)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        del self._bytes
        self._stack.close()

    def idle(self) -> Sample:
        self._look()
        return {"seconds": self._look()}

    def dirty(self) -> Sample:
        self._look()
        write = self._write()
        return {"seconds": self._look(self._count), "write": write}

    def unlogged(self) -> Sample:
        """Pages that are not protected any more."""
        self._write()
        return {"write": self._write()}

    def _write(self) -> float:
        """Microseconds for each page."""
        start = time.perf_counter()
        self._bytes[self._where] += 1
        return (time.perf_counter() - start) / self._count * 1e6


class _Guest:
    """A machine on KVM, whose guest goes over as many pages as are to be dirty."""

    def __init__(self, size: int, dirty: int) -> None:
        guest = GuestConfig(working_set=dirty * _PAGE, heartbeat=0.02)
        self._config = MachineConfig(kind="kvm", ram=size, guest=guest)
        self._count = dirty
        self._console = Console()

    def __enter__(self) -> _Guest:
        self._machine: HostedMachine = create(self._config, serial=self._console.feed)
        self._machine.start()
        self._console.wait_filled()
        self._block = self._machine.memory["ram"]
        self._block.array[::_PAGE].max()  # all of it has memory
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.close()

    def cases(self) -> dict[str, Callable[[], Sample]]:
        logs = {
            "kvm": self._machine.dirty_log,
            "userfaultfd": lambda: open_dirty_log(self._machine.memory, "userfaultfd"),
        }
        run = {case: (lambda log=log: self._run(log())) for case, log in logs.items()}
        return {"none": self._unlogged, **run, "idle": self._idle, "dirty": self._dirty}

    def _unlogged(self) -> Sample:
        return self._pages(lambda: None)

    def _run(self, log: DirtyLog) -> Sample:
        log.start()
        try:
            return self._pages(_Look(log, self._block))
        finally:
            log.stop()

    def _pages(self, look: Callable[[], object]) -> Sample:
        """Thousands of pages that the guest rewrites in a second of its time."""
        before = self._console.wait_beat()
        for _ in range(_LOOKS):
            look()
            time.sleep(_INTERVAL)
        after = self._console.wait_beat()
        return {"pages": (after.hot - before.hot) / (after.time - before.time) * 1e6}

    def _dirty(self) -> Sample:
        """All pages of the working set."""
        return {"seconds": self._standing()[0]}

    def _idle(self) -> Sample:
        return {"seconds": self._standing()[1]}

    def _standing(self) -> tuple[float, float]:
        log = self._machine.dirty_log()
        log.start()
        try:
            start = self._console.wait_beat().hot
            while self._console.wait_beat().hot < start + 2 * self._count:
                pass
            self._machine.pause()
            look = _Look(log, self._block)
            return look(self._count), look()
        finally:
            log.stop()
            self._machine.resume()
