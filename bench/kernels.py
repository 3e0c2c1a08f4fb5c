"""The kernels over pages, compiled and in plain Python, beside ``memcpy``.

Each goes through 64 MiB in steps of 1 MiB, as bytes come from a socket, and the plain ones through
1 MiB.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.measure import Row, Sample, Samples, Target, Unmeasured, rate
from bench.places import Places
from vmferry.pages import CONTINUE, PAGE, ROW, Rows, XbzrleCache, _plain, rows_of

_SIZE = 64 << 20
_STEP = 1 << 20
_PAGE = 4096
_NAME = b"\x06pc.ram"
_RECORD = 8 + _PAGE


def rows(_where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    shown = {"copy": "memcpy", "read": "reading alone"}
    cases: dict[str, Callable[[], Sample]] = {"copy": _copy, "read": _read}
    for module, kind in ((_compiled(), "compiled"), (_plain, "plain")):
        steps = _SIZE // _STEP if kind == "compiled" and not quick else 1
        kernels = _Work(module, steps).kernels() | _Live(module, steps).kernels()
        for kernel, run in kernels.items():
            case = f"{kernel}/{kind}"
            cases[case] = run
            shown[case] = f"{kernel}, {kind}"
    samples = Samples(cases, rounds)
    for case, what in shown.items():
        target = Target(8) if case == "zero_pages/compiled" else None
        yield samples.row(f"kernels/{case}", what, "GB/s", case, rate, target)
    title = "zero_pages, compiled, against reading alone"
    yield samples.ratio("kernels/zero_pages/read", title, "zero_pages/compiled", "read", rate)


def _compiled() -> ModuleType | None:
    try:
        return import_module("vmferry.pages._compiled")
    except ModuleNotFoundError:
        return None


def timed(size: int, run: Callable[[], object]) -> Sample:
    """By the clock of the thread, which stands while others have the processor."""
    start = time.thread_time()
    run()
    return {"seconds": time.thread_time() - start, "bytes": size}


def _copy() -> Sample:
    data, other = np.ones(_SIZE, np.uint8), np.zeros(_STEP, np.uint8)

    def copy() -> None:
        for at in range(0, _SIZE, _STEP):
            np.copyto(other, data[at : at + _STEP])

    return timed(_SIZE, copy)


def _read() -> Sample:
    data = np.ones(_SIZE // 8, np.uint64)
    return timed(_SIZE, lambda: np.bitwise_or.reduce(data))


def _kernel(module: ModuleType | None, name: str) -> Callable[..., Any]:
    if module is None:
        raise Unmeasured("the kernels were not compiled")
    kernel: Callable[..., Any] = getattr(module, name)
    return kernel


class _Work:
    """The same data for every kernel of one *module*, in *steps* steps."""

    def __init__(self, module: ModuleType | None, steps: int) -> None:
        self._module = module
        self._steps = steps
        self._pages = np.random.default_rng(1).bytes(_STEP)
        self._count = _STEP // _PAGE
        words = np.arange(self._count, dtype=np.uint64) * np.uint64(_PAGE)
        self._words = words | np.uint64(PAGE | CONTINUE)
        self._sums = np.zeros(self._count, np.uint64)

    def kernels(self) -> dict[str, Callable[[], Sample]]:
        return {
            "page_sums": lambda: self._sum(self._pages),
            "page_sums of zeros": lambda: self._sum(bytes(_STEP)),
            "scan_records": self._scan,
            "pack_records": self._pack,
            "store_records": self._store,
        }

    def _rows(self, first: int, step: int) -> Rows:
        positions = first + np.arange(self._count, dtype=np.uint64) * np.uint64(step)
        return rows_of(self._words, positions.astype(np.uint64), _PAGE)

    def _each(self, data: bytes, run: Callable[[memoryview], object]) -> Sample:
        """*run* on one copy of *data* after the other, none of them in the cache."""
        copies = memoryview(bytearray(data * self._steps))

        def each() -> None:
            for at in range(0, len(copies), len(data)):
                run(copies[at : at + len(data)])

        return timed(len(copies), each)

    def _sum(self, data: bytes) -> Sample:
        kernel = _kernel(self._module, "page_sums")
        return self._each(data, lambda piece: kernel(piece, _PAGE, self._sums))

    def _packed(self) -> bytes:
        out = bytearray(self._count * _RECORD)
        _plain.pack_records(self._rows(0, _PAGE), 0, memoryview(self._pages), _PAGE, _NAME, out)
        return bytes(out)

    def _scan(self) -> Sample:
        kernel, found = _kernel(self._module, "scan_records"), np.zeros(self._count, ROW)
        return self._each(
            self._packed(),
            lambda piece: kernel(piece, 0, len(piece), _PAGE, _STEP, _NAME, found),
        )

    def _pack(self) -> Sample:
        kernel, out = _kernel(self._module, "pack_records"), bytearray(self._count * _RECORD)
        rows = self._rows(0, _PAGE)
        return self._each(
            self._pages, lambda piece: kernel(rows, 0, piece, _PAGE, _NAME, memoryview(out))
        )

    def _store(self) -> Sample:
        """Into a file in memory, over pages that it has already."""
        kernel, rows = _kernel(self._module, "store_records"), self._rows(8, _RECORD)
        file = os.memfd_create("bench")
        try:
            os.pwrite(file, bytes(_STEP), 0)
            return self._each(
                self._packed(), lambda piece: kernel(file, rows, 0, piece, _PAGE, self._sums)
            )
        finally:
            os.close(file)


class _Live:
    """The memory of a guest, in *steps* steps, and a buffer that a step goes through."""

    def __init__(self, module: ModuleType | None, steps: int) -> None:
        self._module = module
        self._size = steps * _STEP
        self._out = np.zeros(2 * _STEP, np.uint8)
        self._pages = np.arange(self._size // _PAGE, dtype=np.uint64)

    def kernels(self) -> dict[str, Callable[[], Sample]]:
        return {
            "zero_pages": self._zero,
            "pack_pages": lambda: self._pack(1),
            "pack_pages of zeros": lambda: self._pack(0),
            "pack_pages_xbzrle, ten bytes changed": self._pack_changes,
            "gather_pages": self._gather,
            "apply_records": self._apply,
        }

    def _memory(self, value: int) -> npt.NDArray[np.uint8]:
        return np.full(self._size, value, np.uint8)

    def _zero(self) -> Sample:
        kernel, mask = _kernel(self._module, "zero_pages"), np.zeros(len(self._pages), np.uint8)
        memory = self._memory(0)
        return timed(self._size, lambda: kernel(memory, self._pages, _PAGE, mask))

    def _pack(self, value: int) -> Sample:
        kernel, memory = _kernel(self._module, "pack_pages"), self._memory(value)
        return self._until_done(
            lambda first: kernel(memory, self._pages, first, _PAGE, _NAME, False, self._out)[0]
        )

    def _pack_changes(self) -> Sample:
        kernel, memory = _kernel(self._module, "pack_pages_xbzrle"), self._memory(1)
        cache = XbzrleCache(self._size, _PAGE)

        def pack(first: int) -> int:
            name = (_NAME, False)
            done = kernel(cache, memory, self._pages, first, _PAGE, *name, 0, 1, False, self._out)
            return int(done[0])

        self._until_done(pack)
        for at in range(0, _PAGE, _PAGE // 10 + 1):
            memory[at::_PAGE] = 2
        return self._until_done(pack)

    def _until_done(self, pack: Callable[[int], int]) -> Sample:
        def run() -> None:
            first = 0
            while first < len(self._pages):
                first = pack(first)

        return timed(self._size, run)

    def _gather(self) -> Sample:
        kernel, memory = _kernel(self._module, "gather_pages"), self._memory(1)
        step = _STEP // _PAGE

        def run() -> None:
            for first in range(0, len(self._pages), step):
                kernel(memory, self._pages[first : first + step], _PAGE, self._out)

        return timed(self._size, run)

    def _apply(self) -> Sample:
        """Pages with content, from one buffer, over others that are there already."""
        kernel, memory = _kernel(self._module, "apply_records"), self._memory(1)
        known, count = np.ones(len(self._pages), np.uint8), _STEP // _PAGE
        words = self._pages * np.uint64(_PAGE) | np.uint64(PAGE | CONTINUE)
        positions = np.arange(count, dtype=np.uint64) * np.uint64(_PAGE)
        steps = [
            rows_of(words[first : first + count], positions, _PAGE)
            for first in range(0, len(words), count)
        ]
        self._out[:] = 2

        def run() -> None:
            for rows in steps:
                kernel(memory, rows, 0, self._out, _PAGE, known)

        return timed(self._size, run)
