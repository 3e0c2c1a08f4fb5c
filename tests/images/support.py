"""Images of every kind, and what tests ask about them from outside."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vmferry.images import Image, open_image

PROMPT = 30.0
"""Seconds within which whatever is prompt happens even on a busy machine."""
SIZE = 4 << 20


def noise(seed: int, count: int) -> bytes:
    """*count* bytes, the same every time."""
    return random.Random(seed).randbytes(count)  # noqa: S311 - nothing secret


def read(image: Image, offset: int = 0, length: int | None = None) -> bytes:
    data = bytearray(image.size - offset if length is None else length)
    image.read(offset, data)
    return bytes(data)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make(path: Path, form: str, size: int = SIZE) -> Path:
    """A new image, made by QEMU."""
    qemu_img("create", "-q", "-f", form, str(path), str(size))
    return path


def qemu_img(*arguments: str) -> str:
    return _run("qemu-img", *arguments).stdout


def qemu_io(path: Path, command: str, form: str = "raw", *options: str) -> str:
    """What ``qemu-io`` answers; its errors too, as it ends with 0 for some of them."""
    done = _run("qemu-io", "-f", form, *options, "-c", command, str(path), check=False)
    return done.stdout + done.stderr


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    program = shutil.which(command[0])
    assert program, f"{command[0]} is missing: apt-get install qemu-utils"
    return subprocess.run(
        [program, *command[1:]], capture_output=True, text=True, check=check, timeout=PROMPT
    )


@contextlib.contextmanager
def nbd_server(*arguments: str, at: Path) -> Iterator[str]:
    """A ``qemu-nbd`` at *at*, for as many clients as come; the URI of its export."""
    program = shutil.which("qemu-nbd")
    assert program, "qemu-nbd is missing: apt-get install qemu-utils"
    process = subprocess.Popen([program, "-t", "-e", "8", "-k", str(at), "-x", "disk", *arguments])
    try:
        wait_until(lambda: _listens(at) or process.poll() is not None)
        yield f"nbd+unix:///disk?socket={at}"
    finally:
        process.kill()
        process.wait()


def on_small_file_system(directory: Path, script: str) -> str:
    """What *script* prints that has 2 MiB for its ``sys.argv[1]``, a file of *directory*."""
    mount = f"mount -t tmpfs -o size=2m none {directory} || exit 99"
    done = subprocess.run(
        [
            *("unshare", "--mount", "--map-root-user", "sh", "-c"),
            f'{mount}; exec "$0" -c "$1" {directory}/disk',
            *(sys.executable, script),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 99 or done.stderr.startswith("unshare"):
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    assert not done.stderr, done.stderr
    return done.stdout


@contextlib.contextmanager
def block_device(file: Path) -> Iterator[str]:
    """A block device that is kept in *file*."""
    if not shutil.which("losetup"):
        pytest.skip("losetup is missing: apt-get install mount")
    done = subprocess.run(
        ["losetup", "--find", "--show", file], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"there is no loop device: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return not probe.connect_ex(str(path))


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PROMPT
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.005)


@dataclass(frozen=True)
class Kind:
    """A kind of image: how to open it, and the file that it is in."""

    where: str
    path: Path
    options: dict[str, Any]

    def open(self, *, active: bool, **options: Any) -> Image:
        return open_image(self.where, active=active, **self.options | options)

    def content(self) -> bytes:
        """What QEMU reads from it."""
        form = self.options.get("format", "raw")
        raw = self.path.with_suffix(".content")
        qemu_img("convert", "-U", "-f", form, "-O", "raw", str(self.path), str(raw))
        return raw.read_bytes()


KINDS = ("raw", "direct", "qcow2", "vmdk", "nbd", "nbd-blocks")


@contextlib.contextmanager
def kind(name: str, directory: Path, size: int = SIZE) -> Iterator[Kind]:
    """An empty image of a kind."""
    path = directory / f"disk of, {name}"
    if name in {"qcow2", "vmdk"}:
        yield Kind(str(make(path, name, size)), path, {"format": name})
        return
    make(path, "raw", size)
    if name in {"raw", "direct"}:
        yield Kind(str(path), path, {"direct": name == "direct"})
        return
    drive = {"driver": "raw", "file": {"driver": "file", "filename": str(path)}}
    if name == "nbd-blocks":  # a server that takes nothing but blocks of 4 KiB
        drive = {"driver": "blkdebug", "align": 4096, "image": drive}
    with nbd_server("json:" + json.dumps(drive), at=directory / "s") as uri:
        yield Kind(uri, path, {})


OWNER = """
import os, signal, sys, threading, time
from vmferry.images import open_image
image = open_image(sys.argv[1], active=False, format=sys.argv[2])
image.activate()
image.write(4096, b"owner" * 1000)
"""
"""A process that owns an image; what it does then comes behind."""


@contextlib.contextmanager
def owner(path: Path, form: str, then: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that has taken the image, done *then*, and waits; it leads a group of its own."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            OWNER + then + "\nprint('ready', flush=True)\ninput()\n",
            path,
            form,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """The processes that a process has started and that have not been waited for."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or a zombie that nobody has waited for."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
