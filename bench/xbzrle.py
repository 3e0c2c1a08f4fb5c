"""XBZRLE, compiled, and beside it QEMU's own C where VMFERRY_QEMU_XBZRLE says where that is.

Both are called page by page from one loop in C, which is compiled for that.  See
``tests/support/qemu_xbzrle.py`` for the variable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.kernels import timed
from bench.measure import Row, Sample, Samples, Target, Unmeasured, rate
from bench.places import Places
from tests.support.qemu_xbzrle import compile_library, qemu_xbzrle

_PAGE = 4096
_SIZE = 32 << 20
_QUICK = 1 << 20
_LOOP = """
#include <stdint.h>
void encode_all(int (*f)(const uint8_t *, const uint8_t *, int, uint8_t *, int),
                const uint8_t *old, const uint8_t *new, uint8_t *out, int *lengths, long count)
{
    for (long i = 0; i < count; i++)
        lengths[i] = f(old + 4096 * i, new + 4096 * i, 4096, out + 4096 * i, 4096);
}
void decode_all(int (*f)(const uint8_t *, int, uint8_t *, int),
                const uint8_t *in, uint8_t *pages, const int *lengths, long count)
{
    for (long i = 0; i < count; i++)
        f(in + 4096 * i, lengths[i], pages + 4096 * i, 4096);
}
"""

Pages = npt.NDArray[np.uint8]
Functions = tuple[ctypes.c_void_p, ctypes.c_void_p]
"""What encodes and what decodes."""


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    library = compile_library(where.work / "loop.so", str(_source(where.work)))
    loop = ctypes.CDLL(str(library))
    both = {"vmferry": _ours()}
    if theirs := _theirs():
        both["qemu"] = theirs
    old, kinds = _pages((_QUICK if quick else _SIZE) // _PAGE)
    cases: dict[str, Callable[[], Sample]] = {}
    for kind, new in kinds.items():
        for who, functions in both.items():
            work = _Work(loop, functions, old, new)
            cases[f"encode/{kind}/{who}"] = work.encode
            cases[f"decode/{kind}/{who}"] = work.decode
    samples = Samples(cases, rounds)
    for step in ("encode", "decode"):
        for kind in kinds:
            name, what = f"xbzrle/{step}/{kind}", f"XBZRLE {step}, {kind}"
            case, other = f"{step}/{kind}/vmferry", f"{step}/{kind}/qemu"
            yield samples.row(name, what, "GB/s", case, rate)
            if other in cases:
                yield samples.row(f"{name}/qemu", f"{what}: QEMU's C", "GB/s", other, rate)
                title = f"{what}: times as fast as QEMU's C"
                yield samples.ratio(f"{name}/ratio", title, case, other, rate, Target(1))


def _source(directory: Path) -> Path:
    path = directory / "loop.c"
    path.write_text(_LOOP)
    return path


def _ours() -> Functions:
    """The functions behind the kernels, from the table that they have for each other."""
    try:
        from vmferry.pages._compiled import xbzrle  # noqa: PLC0415 - it may not be there
    except ModuleNotFoundError:
        raise Unmeasured("the kernels were not compiled") from None
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsules = [xbzrle.__pyx_capi__[function] for function in ("encode", "decode")]
    encode, decode = (ctypes.c_void_p(pointer(capsule, name(capsule))) for capsule in capsules)
    return encode, decode


def _theirs() -> Functions | None:
    library = qemu_xbzrle()
    if library is None:
        return None
    functions = (library.xbzrle_encode_buffer, library.xbzrle_decode_buffer)
    encode, decode = (ctypes.cast(function, ctypes.c_void_p) for function in functions)
    return encode, decode


def _pages(count: int) -> tuple[Pages, dict[str, Pages]]:
    """Pages without order, and the same after changes of each kind."""
    random = np.random.default_rng(1)
    old = random.integers(0, 256, (count, _PAGE), np.uint8)
    few, many, half = old.copy(), old.copy(), old.copy()
    for _ in range(10):
        few[np.arange(count), random.integers(0, _PAGE, count)] ^= 0x55
    many[:, ::4] ^= 0x55
    half[:, _PAGE // 4 : -_PAGE // 4] = random.integers(0, 256, (count, _PAGE // 2), np.uint8)
    return old, {"ten bytes changed": few, "every fourth byte": many, "half the page": half}


class _Work:
    """All pages of one kind, with one pair of functions."""

    def __init__(self, loop: ctypes.CDLL, functions: Functions, old: Pages, new: Pages) -> None:
        self._loop = loop
        self._encoder, self._decoder = functions
        self._old, self._new = old, new
        self._out = np.zeros_like(old)
        self._target = old.copy()
        self._lengths = np.zeros(len(old), np.int32)

    def encode(self) -> Sample:
        return self._run("encode_all", self._encoder, self._old, self._new, self._out)

    def decode(self) -> Sample:
        """What was encoded before, into the same pages again and again."""
        sample = self._run("decode_all", self._decoder, self._out, self._target)
        if not np.array_equal(self._target, self._new):
            raise Unmeasured("what was decoded is not what was encoded")
        return sample

    def _run(self, loop: str, function: ctypes.c_void_p, *pages: Pages) -> Sample:
        run = getattr(self._loop, loop)
        arrays = [ctypes.c_void_p(array.ctypes.data) for array in (*pages, self._lengths)]
        count = ctypes.c_long(len(self._old))
        return timed(self._old.nbytes, lambda: run(function, *arrays, count))
