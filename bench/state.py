"""Declared device state: fields a second, and a large buffer beside ``memcpy``.

A machine of 1,000 devices of 50 numbers each; the naive row packs the same numbers one by one.
Seconds are those that one core worked, so that what else runs beside counts as little as it can.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from bench.measure import Row, Sample, Samples, Target, rate
from bench.places import Places
from vmferry import Registry, load, save
from vmferry.vmstate import U8, U16, U32, U64, Buffer, device
from vmferry.vmstate import load as load_state
from vmferry.vmstate import save as save_state

_DEVICES = 1000
_KINDS: tuple[tuple[Any, str], ...] = ((U8, ">B"), (U16, ">H"), (U32, ">I"), (U64, ">Q"))
_NUMBERS = [_KINDS[index % 4] for index in range(50)]
_BUFFER = 16 << 20


@device("video", version=1)
@dataclass
class _Video:
    memory: Annotated[bytearray, Buffer(_BUFFER)] = field(
        default_factory=lambda: bytearray(_BUFFER)
    )


@dataclass
class _Machine:
    name: str
    registry: Registry


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    count = _DEVICES // 10 if quick else _DEVICES
    fields = count * len(_NUMBERS)
    board = _Device()
    devices = [board.make(seed) for seed in range(count)]
    states = [save_state(one) for one in devices]
    registry = Registry()
    for one in devices:
        registry.register(one)
    machine = _Machine("bench-1.0", registry)
    video, other = _Video(), _Video()
    path = where.memory / "snapshot"
    samples = Samples(
        {
            "save": lambda: _timed(fields, lambda: [save_state(one) for one in devices]),
            "load": lambda: _timed(
                fields,
                lambda: [
                    load_state(one, state, 1) for one, state in zip(devices, states, strict=True)
                ],
            ),
            "naive": lambda: _timed(fields, lambda: [board.pack(one) for one in devices]),
            "snapshot save": lambda: _timed(fields, lambda: save(machine, path)),
            "snapshot load": lambda: _timed(fields, lambda: load(machine, path)),
            "memcpy": lambda: _timed(_BUFFER, lambda: bytes(video.memory)),
            "buffer save": lambda: _timed(_BUFFER, lambda: save_state(video)),
            "buffer load": _load_buffer(other, save_state(video)),
        },
        rounds,
    )
    for case, least in (("save", 3), ("load", 3), ("naive", None)):
        target = Target(least) if least else None
        yield samples.row(f"state/{case}", f"{case} fields", "M/s", case, _millions, target)
    for case in ("snapshot save", "snapshot load"):
        name = f"{case}, with file and description"
        yield samples.row(f"state/{case}", name, "M/s", case, _millions, Target(3))
    for case in ("memcpy", "buffer save", "buffer load"):
        yield samples.row(f"state/{case}", f"{case}, 16 MiB", "GB/s", case, rate)
    Path(path).unlink(missing_ok=True)


class _Device:
    """A class of 50 numbers of all widths."""

    def __init__(self) -> None:
        names = [(f"field{index}", kind, 0) for index, (kind, _) in enumerate(_NUMBERS)]
        self._class = device("board", version=1)(make_dataclass("Board", names))
        self._pack = [(f"field{index}", form) for index, (_, form) in enumerate(_NUMBERS)]

    def make(self, seed: int) -> Any:
        return self._class(*((seed + index) % 251 for index in range(len(_NUMBERS))))

    def pack(self, one: Any) -> bytes:
        return b"".join(struct.pack(form, getattr(one, name)) for name, form in self._pack)


def _timed(size: int, run: Callable[[], object]) -> Sample:
    start = time.process_time()
    run()
    return {"seconds": time.process_time() - start, "bytes": size}


def _load_buffer(video: _Video, state: bytes) -> Callable[[], Sample]:
    return lambda: _timed(_BUFFER, lambda: load_state(video, state, 1))


def _millions(sample: Sample) -> float:
    return sample["bytes"] / sample["seconds"] / 1e6
