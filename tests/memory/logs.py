"""Every kind of dirty log over memory that this process writes, and somebody who keeps a copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.machines.hosted import NO_KVM
from tests.machines.small import Recorder
from vmferry.machines.kvm import KvmHost
from vmferry.memory import DirtyLog, GuestMemory, MemoryBlock, open_dirty_log
from vmferry.memory.userfaultfd import UserfaultfdLog

PAGE = 4096
every_kind = pytest.mark.parametrize("kind", ["userfaultfd", "kvm", "shadow"])


def need_userfaultfd() -> None:
    """Skip the test where there is none, with the reason."""
    if missing := UserfaultfdLog.missing():
        pytest.skip(missing)


def need_kvm() -> None:
    """Skip the test where there is no KVM, with the reason."""
    if NO_KVM:
        pytest.skip(NO_KVM)


class Guest:
    """Memory, a log of it that was not started yet, and for KVM a VM that has the memory."""

    def __init__(self, kind: str, memory: GuestMemory) -> None:
        self.memory = memory
        self.host = KvmHost(Recorder()) if kind == "kvm" else None
        self.log: DirtyLog = open_dirty_log(memory, kind, kvm=self.host)

    def add(self, name: str, pages: int) -> MemoryBlock:
        block = self.memory.add(name, pages * PAGE)
        if self.host is not None:
            end = max((slot.start + slot.size for slot in self.host.slots), default=0)
            self.host.map(end, self.memory.map_for_vcpus(block), block.size)
        return block


@contextmanager
def guest(kind: str) -> Iterator[Guest]:
    if kind != "shadow":
        need_userfaultfd()
    if kind == "kvm":
        need_kvm()
    with GuestMemory() as memory:
        made = Guest(kind, memory)
        try:
            yield made
        finally:
            made.log.stop()
            if made.host is not None:
                made.host.close()


def collect(log: DirtyLog, block: MemoryBlock) -> set[int]:
    """The pages that the log reports, and nothing but pages of the block."""
    words = np.zeros(-(-block.pages // 64), np.uint64)
    count = log.collect(block, words)
    found = pages_of(words)
    assert count == len(found)
    assert all(page < block.pages for page in found)
    return set(found)


def pages_of(words: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


class Copy:
    """A destination: what has been sent to it of a block, after the log was started."""

    def __init__(self, log: DirtyLog, block: MemoryBlock) -> None:
        self._log = log
        self._block = block
        self._content = np.frombuffer(log.content(block), np.uint8).reshape(-1, PAGE)
        self._sent = self._content.copy()

    def send(self) -> None:
        pages = list(collect(self._log, self._block))
        self._sent[pages] = self._content[pages]

    def check(self) -> None:
        """It is the same now; nobody writes any more."""
        self.send()
        live = self._block.array.reshape(-1, PAGE)
        assert np.flatnonzero((self._sent != live).any(axis=1)).tolist() == []


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


class Restless:
    """Threads that write and write, until they are left."""

    def __init__(self, *writers: Callable[[], None]) -> None:
        self._stop = False
        self._errors: list[Exception] = []
        self.turns = [0] * len(writers)
        self._threads = [
            threading.Thread(target=self._run, args=(number, writer), daemon=True)
            for number, writer in enumerate(writers)
        ]

    def _run(self, number: int, writer: Callable[[], None]) -> None:
        try:
            while not self._stop:
                writer()
                self.turns[number] += 1
        except Exception as error:  # noqa: BLE001
            self._errors.append(error)

    def __enter__(self) -> Restless:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()
        assert self._errors == []


def writers(block: MemoryBlock, seed: int) -> list[Callable[[], None]]:
    """One that counts up, one that writes back and forth, one that fills whole pages.

    Each in pages all over the block, and in places of its own.
    """
    words = block.array.view(np.uint64).reshape(-1, PAGE // 8)
    random = np.random.default_rng(seed)

    def some() -> np.ndarray:
        return random.integers(0, block.pages, 16)

    numbers = [some() for _ in range(256)]
    turn = iter(range(1 << 62))

    def count() -> None:
        words[numbers[next(turn) % 256], 3] += np.uint64(1)

    def toggle() -> None:
        words[numbers[next(turn) % 256], 200] ^= np.uint64(1)

    def fill() -> None:
        # Large enough for numpy to release the interpreter lock on the way.
        half = block.pages // 2
        np.add(words[:half, 256:], np.uint64(1), out=words[:half, 256:])

    return [count, toggle, fill]
