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

import numpy as np

from bench.measure import Row, Sample, Samples, Unmeasured, rate
from bench.places import Places
from vmferry.pages import CONTINUE, PAGE, ROW, Rows, _plain, rows_of

_SIZE = 64 << 20
_STEP = 1 << 20
_PAGE = 4096
_NAME = b"\x06pc.ram"
_RECORD = 8 + _PAGE


def rows(_where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    shown = {"copy": "memcpy"}
    cases: dict[str, Callable[[], Sample]] = {"copy": _copy}
    for module, kind in ((_compiled(), "compiled"), (_plain, "plain")):
        work = _Work(module, _SIZE // _STEP if kind == "compiled" and not quick else 1)
        for kernel, run in work.kernels().items():
            case = f"{kernel}/{kind}"
            cases[case] = run
            shown[case] = f"{kernel}, {kind}"
    samples = Samples(cases, rounds)
    for case, what in shown.items():
        yield samples.row(f"kernels/{case}", what, "GB/s", case, rate)


def _compiled() -> ModuleType | None:
    try:
        return import_module("vmferry.pages._compiled")
    except ModuleNotFoundError:
        return None


def _timed(size: int, run: Callable[[], object]) -> Sample:
    start = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - start, "bytes": size}


def _copy() -> Sample:
    data, other = np.ones(_SIZE, np.uint8), np.zeros(_STEP, np.uint8)

    def copy() -> None:
        for at in range(0, _SIZE, _STEP):
            np.copyto(other, data[at : at + _STEP])

    return _timed(_SIZE, copy)


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
            "zero test": lambda: self._sum(bytes(_STEP)),
            "scan_records": self._scan,
            "pack_records": self._pack,
            "store_records": self._store,
        }

    def _kernel(self, name: str) -> Callable[..., tuple[int, int]]:
        if self._module is None:
            raise Unmeasured("the kernels were not compiled")
        kernel: Callable[..., tuple[int, int]] = getattr(self._module, name)
        return kernel

    def _rows(self, first: int, step: int) -> Rows:
        positions = first + np.arange(self._count, dtype=np.uint64) * np.uint64(step)
        return rows_of(self._words, positions.astype(np.uint64), _PAGE)

    def _each(self, data: bytes, run: Callable[[memoryview], object]) -> Sample:
        """*run* on one copy of *data* after the other, none of them in the cache."""
        copies = memoryview(bytearray(data * self._steps))

        def each() -> None:
            for at in range(0, len(copies), len(data)):
                run(copies[at : at + len(data)])

        return _timed(len(copies), each)

    def _sum(self, data: bytes) -> Sample:
        kernel = self._kernel("page_sums")
        return self._each(data, lambda piece: kernel(piece, _PAGE, self._sums))

    def _packed(self) -> bytes:
        out = bytearray(self._count * _RECORD)
        _plain.pack_records(self._rows(0, _PAGE), 0, memoryview(self._pages), _PAGE, _NAME, out)
        return bytes(out)

    def _scan(self) -> Sample:
        kernel, found = self._kernel("scan_records"), np.zeros(self._count, ROW)
        return self._each(
            self._packed(),
            lambda piece: kernel(piece, 0, len(piece), _PAGE, _STEP, _NAME, found),
        )

    def _pack(self) -> Sample:
        kernel, out = self._kernel("pack_records"), bytearray(self._count * _RECORD)
        rows = self._rows(0, _PAGE)
        return self._each(
            self._pages, lambda piece: kernel(rows, 0, piece, _PAGE, _NAME, memoryview(out))
        )

    def _store(self) -> Sample:
        """Into a file in memory, over pages that it has already."""
        kernel, rows = self._kernel("store_records"), self._rows(8, _RECORD)
        file = os.memfd_create("bench")
        try:
            os.pwrite(file, bytes(_STEP), 0)
            return self._each(
                self._packed(), lambda piece: kernel(file, rows, 0, piece, _PAGE, self._sums)
            )
        finally:
            os.close(file)
