"""Disk images: a copy beside ``cp``, and how long nobody has an image that changes sides."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.measure import Row, Sample, Samples, Target, milliseconds, rate
from bench.places import Places
from vmferry.images import Image, open_image

_PIECE = 256 << 10


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    directory = where.disk or where.work
    size = (128 if quick else 1024) << 20
    source, target = directory / "source", directory / "target"
    with source.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    samples = Samples(
        {
            "cp": lambda: _cp(source, target, size),
            "copy": lambda: _copy(source, target, size),
            "raw": lambda: _hand_over(directory / "raw", "raw"),
            "qcow2": lambda: _hand_over(directory / "qcow2", "qcow2"),
        },
        rounds,
        before=lambda: target.unlink(missing_ok=True) or os.sync(),
    )
    what = f"copy of a raw image of {size >> 20} MiB, with its flush"
    yield samples.row("images/copy", what, "GB/s", "copy", rate)
    yield samples.row("images/cp", "cp and fsync of the same", "GB/s", "cp", rate)
    yield samples.ratio("images/copy/cp", "copy against cp", "copy", "cp", rate, Target(0.7))
    for form, most in (("raw", 5), ("qcow2", 50)):
        name = f"{form}: from active here to active there, flushed before"
        figure = milliseconds("seconds")
        goal = Target(most, most=True)
        yield samples.row(f"images/handover/{form}", name, "ms", form, figure, goal)
    source.unlink()
    target.unlink(missing_ok=True)


def _cp(source: Path, target: Path, size: int) -> Sample:
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return {"seconds": time.perf_counter() - start, "bytes": size}


def _copy(source: Path, target: Path, size: int) -> Sample:
    start = time.perf_counter()
    with target.open("wb") as file:
        file.truncate(size)
    with (
        open_image(source, active=True, read_only=True) as original,
        open_image(target, active=True) as image,
    ):
        piece = memoryview(bytearray(_PIECE))
        for extent in original.allocated():
            for at in range(extent.offset, extent.end, _PIECE):
                part = piece[: extent.end - at]
                original.read(at, part)
                image.write(at, part)
    return {"seconds": time.perf_counter() - start, "bytes": size}


def _hand_over(path: Path, form: str) -> Sample:
    subprocess.run(["qemu-img", "create", "-q", "-f", form, path, "1G"], check=True)
    with (
        open_image(path, active=True, format=form) as here,
        open_image(path, active=False, format=form) as there,
    ):
        _use(here)
        start = time.perf_counter()
        here.inactivate()
        there.activate()
        return {"seconds": time.perf_counter() - start}


def _use(image: Image) -> None:
    for at in range(0, 64 << 20, 1 << 20):
        image.write(at, os.urandom(1 << 20))
    image.flush()
