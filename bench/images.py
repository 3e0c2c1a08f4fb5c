"""Disk images: copies beside ``cp``, within a migration too, and how long nobody has an image.

That is while it changes sides.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.live import ours
from bench.machines import Guest
from bench.measure import Row, Sample, Samples, Target, Unmeasured, milliseconds, rate
from bench.places import Places
from vmferry.images import Image, open_image
from vmferry.qemu import QemuProcess

_PIECE = 256 << 10
_TIMEOUT = 300.0
_DISKS = ("block", "zero-blocks")
_GUEST = Guest("disk", 16, pages=16)


def rows(where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page."""
    directory = where.disk or where.work
    source, target = directory / "source", directory / "target"
    try:
        yield from _copies(source, target, (128 if quick else 1024) << 20, rounds)
        yield from _moves(source, target, (128 if quick else 2048) << 20, where, rounds)
    finally:
        source.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


def _copies(source: Path, target: Path, size: int, rounds: int) -> Iterator[Row]:
    _fill(source, size, size)
    directory = source.parent
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


def _moves(source: Path, target: Path, size: int, where: Places, rounds: int) -> Iterator[Row]:
    """A raw image that moves with its machine; every other 64 MiB of it is a hole."""
    _fill(source, size, 64 << 20)
    samples = Samples(
        {
            "cp": lambda: _cp(source, target, size),
            "ours": lambda: _with_ours(source, target, size, where.work),
            "qemu": lambda: _with_qemu(source, target, size, where.work),
        },
        rounds,
        before=lambda: _empty(target, size),
    )
    what = f"raw image of {size >> 20} MiB, half of it holes, within a migration, durable"
    yield samples.row("images/move", what, "GB/s", "ours", rate)
    yield samples.row("images/move/qemu", "QEMU to QEMU, the same image", "GB/s", "qemu", rate)
    yield samples.row("images/move/cp", "cp and fsync of it", "GB/s", "cp", rate)
    name = "within a migration, against"
    yield samples.ratio("images/move/of-cp", f"{name} cp", "ours", "cp", rate, Target(0.7))
    yield samples.ratio("images/move/of-qemu", f"{name} QEMU", "ours", "qemu", rate, Target(2))
    figure = milliseconds("downtime")
    yield samples.row("images/move/downtime", "meanwhile: downtime", "ms", "ours", figure)
    most = Target(64, most=True)
    name = "meanwhile: memory of either side at most"
    yield samples.row("images/move/memory", name, "MiB", "ours", _mebibytes, most)


def _fill(path: Path, size: int, run: int) -> None:
    """*size* bytes, of which every other *run* has noise; all of it if there is only one."""
    with path.open("wb") as file:
        file.truncate(size)
        for start in range(0, size, 2 * run):
            file.seek(start)
            for _ in range(run >> 20):
                file.write(os.urandom(1 << 20))


def _empty(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    os.sync()


def _mebibytes(sample: Sample) -> float:
    return sample["anonymous"] / (1 << 20)


def _with_ours(source: Path, target: Path, size: int, where: Path) -> Sample:
    with (
        ours(_GUEST, where, "disk-here", disk=source) as here,
        ours(_GUEST, where, "disk-there", disk=target, uri="defer") as there,
    ):
        sample = here.with_disk(f"unix:{where}/disks", there)
        return {**sample, "seconds": sample["seconds"] + _flush(target), "bytes": size}


def _with_qemu(source: Path, target: Path, size: int, where: Path) -> Sample:
    machine = ["-machine", "pc,accel=tcg", "-nodefaults", "-m", "16"]
    drive = "if=virtio,id=disk0,format=raw,discard=unmap,file="
    uri = f"unix:{where}/disks"
    with (
        QemuProcess([*machine, "-drive", f"{drive}{source}"]) as here,
        QemuProcess([*machine, "-drive", f"{drive}{target}", "-incoming", "defer"]) as there,
    ):
        there.incoming(uri, capabilities=_DISKS)
        # With any other limit QEMU 7.2.22 stops before it has sent all of a disk.
        limits = {"max-bandwidth": 1 << 40, "downtime-limit": 0}
        here.migrate(uri, capabilities=_DISKS, parameters=limits)
        here.wait_migration(timeout=_TIMEOUT)
        there.wait_migration(timeout=_TIMEOUT)
        answer = here.execute("query-migrate")  # with the time that it took
        taken = answer["total-time"] / 1e3 + _flush(target)
    _compare(source, target)
    return {"seconds": taken, "bytes": size}


def _compare(source: Path, target: Path) -> None:
    if subprocess.run(["cmp", "-s", source, target], check=False).returncode:
        raise Unmeasured("the disk has not arrived whole")


def _flush(path: Path) -> float:
    """How many seconds it takes until what was written to *path* is durable."""
    start = time.perf_counter()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def _cp(source: Path, target: Path, size: int) -> Sample:
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    _flush(target)
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
