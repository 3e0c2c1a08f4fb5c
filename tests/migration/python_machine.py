"""A machine whose processor is a thread of this process: it writes its memory and can check it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import UUID

import numpy as np

from vmferry import Registry
from vmferry.images import Image
from vmferry.memory import DirtyLog, GuestMemory, open_dirty_log
from vmferry.vmstate import U64, device

WORDS = 512
"""Numbers in a page."""


@device("processor", version=1)
@dataclass
class Processor:
    """``steps`` is how often it has gone over all hot pages."""

    steps: U64 = 0


class PythonMachine:
    """``pages`` of RAM, of which each step writes the first ``hot`` ones: a number in each.

    The others have content that tells where they belong; a third of them are zero.
    """

    def __init__(
        self,
        pages: int = 600,
        hot: int = 8,
        *,
        name: str = "python-1.0",
        uuid: UUID | None = None,
        pace: float = 0.001,
        log: str = "auto",
        shared: bool = False,
    ) -> None:
        self.name = name
        self.uuid = uuid
        self.registry = Registry()
        self.processor = Processor()
        self.registry.register(self.processor)
        self.memory = GuestMemory()
        self.ram = self.memory.add("ram", pages * 4096, shared=shared)
        self.throttled: list[int] = []
        self._hot = hot
        self._pace = pace
        self._wrong: set[int] = set()
        self._log = log
        self._may_run = threading.Event()
        self._turn = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def fill(self) -> Self:
        """Give it content, as a machine that has run for long."""
        numbers = np.arange(self._hot, self.ram.pages, dtype=np.uint64)
        words = self.ram.array.view(np.uint64).reshape(-1, WORDS)
        content = numbers * np.uint64(0x9E3779B97F4A7C15)
        words[self._hot :] = np.where(numbers % 3 == 0, 0, content)[:, None]
        return self

    def check(self) -> None:
        """Every page is as it should be after as many steps; it stands still."""
        words = self.ram.array.view(np.uint64).reshape(-1, WORDS)
        assert self._wrong == set()
        assert (words[: self._hot, 0] == self.processor.steps).all()
        wanted = PythonMachine(self.ram.pages, self._hot).fill()
        with wanted:
            assert np.array_equal(
                wanted.ram.array[self._hot * 4096 :], self.ram.array[self._hot * 4096 :]
            )

    @property
    def steps(self) -> int:
        return self.processor.steps

    # What the engine asks for

    @property
    def running(self) -> bool:
        return self._may_run.is_set()

    def pause(self) -> None:
        self._may_run.clear()
        with self._turn:
            pass

    def resume(self) -> None:
        self._may_run.set()

    def throttle(self, percent: int) -> None:
        self.throttled.append(percent)

    images: Sequence[Image] = ()
    vcpu_threads: Sequence[int] = ()

    def dirty_log(self) -> DirtyLog:
        return open_dirty_log(self.memory, self._log)

    def _run(self) -> None:
        hot = self.ram.array.view(np.uint64)[: self._hot * WORDS : WORDS]
        while not self._closed:
            if not self._may_run.wait(0.05):
                continue
            with self._turn:
                if self._may_run.is_set():
                    # Whatever was lost on the way is seen now, or never.
                    self._wrong |= set((hot != self.processor.steps).nonzero()[0].tolist())
                    self.processor.steps += 1
                    hot[:] = self.processor.steps
            time.sleep(self._pace)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._closed = True
        self._thread.join()
        self.memory.close()
