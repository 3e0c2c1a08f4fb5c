"""Formats of QEMU: what its storage daemon leaves behind, and what becomes of all if it fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.images.support import (
    SIZE,
    children,
    make,
    nbd_server,
    noise,
    on_small_file_system,
    qemu_img,
    qemu_io,
    read,
    wait_until,
)
from vmferry.errors import StorageError, UsageError
from vmferry.images import Extent, open_image

pytestmark = pytest.mark.qemu


def test_image_is_clean_each_time(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(path), str(SIZE))
    with open_image(path, active=False, format="qcow2") as image:
        for turn in range(5):
            image.activate()
            image.write(turn * 70_000, noise(turn, 200_000))
            image.discard(turn * 65536, 65536)
            image.inactivate()
            qemu_img("check", "-q", "-f", "qcow2", str(path))
            assert not children(os.getpid())


def test_backing_file_shows_through_and_stays(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "raw")
    qemu_io(base, "write -P 1 0 1M")
    top = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top))
    before = base.read_bytes()
    with open_image(top, active=True, format="qcow2") as image:
        assert list(image.allocated()) == [Extent(0, 1 << 20)]
        image.write(65536, b"\x02" * 65536)
        image.write_zeroes(131072, 65536)
        assert read(image, 0, 3 * 65536) == b"\x01" * 65536 + b"\x02" * 65536 + bytes(65536)
    assert base.read_bytes() == before


def test_missing_backing_file_is_named(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "raw")
    top = tmp_path / "top"
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(top))
    base.unlink()
    with pytest.raises(StorageError, match=f"{top}: .*{base}.*No such file"):
        open_image(top, active=False, format="qcow2")
    assert not children(os.getpid())


def test_wrong_format_is_told(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with pytest.raises(StorageError, match=f"{path}: Image is not in qcow2 format"):
        open_image(path, active=False, format="qcow2")
    with pytest.raises(StorageError, match="nonsense"):
        open_image(path, active=False, format="nonsense")


def test_daemon_that_dies_is_named_and_the_image_can_be_had_back(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "qcow2")
    image = open_image(path, active=True, format="qcow2")
    image.write(0, b"flushed")
    image.flush()
    (daemon,) = children(os.getpid())
    os.kill(daemon, signal.SIGKILL)
    with pytest.raises(StorageError, match=f"{path}: qemu-storage-daemon ended with status -9"):
        image.write(0, b"lost")
    with pytest.raises(StorageError):
        image.close()
    wait_until(lambda: not children(os.getpid()))
    with open_image(path, active=True, format="qcow2") as again:
        assert read(again, 0, 7) == b"flushed"
    qemu_img("check", "-q", "-f", "qcow2", str(path))


FULL_AT_THE_END = """
import os, subprocess, sys
from vmferry.images import open_image
path = sys.argv[1]
subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", path, "dirty"], check=True)
image = open_image(path, active=True, format="qcow2")
image.write(0, bytes(65536))
image.flush()
with open(path + " filler", "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    image.inactivate()
except Exception as error:
    print(type(error).__name__, error, image.active)
"""


def test_what_the_format_cannot_write_at_its_end_fails_the_inactivation(tmp_path: Path) -> None:
    output = on_small_file_system(tmp_path, FULL_AT_THE_END)
    assert output.startswith(f"StorageError {tmp_path}/disk: ")
    assert "ersistent bitmap" in output
    assert output.endswith("No space left on device False\n")


@pytest.mark.parametrize(
    ("event", "number", "message"),
    [
        ("pwritev", 28, "cannot be written: No space left on device"),
        ("pwritev", 5, "cannot be written: Input/output error"),
        ("write_aio", 5, "cannot be written: Input/output error"),
        ("flush_to_disk", 5, "cannot be flushed: Input/output error"),
    ],
)
def test_faults_of_the_storage_behind_a_server(
    tmp_path: Path, event: str, number: int, message: str
) -> None:
    """A fault that comes once: a flush that fails is final all the same."""
    path = make(tmp_path / "disk", "raw")
    fault = {"event": event, "errno": number, "once": True}
    drive = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "inject-error": [fault],
            "image": {"driver": "file", "filename": str(path)},
        },
    }
    with nbd_server("json:" + json.dumps(drive), at=tmp_path / "s") as uri:
        image = open_image(uri, active=True)
        if "flush" in event:
            image.write(0, b"x" * 512)
            with pytest.raises(StorageError, match=f"s: {message}"):
                image.inactivate()
            for again in (image.inactivate, image.close):
                with pytest.raises(StorageError, match="writes before were lost"):
                    again()
        else:
            with pytest.raises(StorageError, match=f"s: {message}"):
                image.write(0, b"x" * 512)
            image.write(0, b"y" * 512)
            image.close()
            assert path.read_bytes()[:512] == b"y" * 512


def test_read_that_fails_leaves_the_image_to_be_used(tmp_path: Path) -> None:
    """QEMU's server hangs up on whoever lets it answer a read in pieces."""
    path = make(tmp_path / "disk", "raw")
    path.write_bytes(noise(1, SIZE))
    fault = {"event": "none", "iotype": "read", "errno": 5, "once": True}
    drive = {
        "driver": "raw",
        "file": {
            "driver": "blkdebug",
            "inject-error": [fault],
            "image": {"driver": "file", "filename": str(path)},
        },
    }
    with (
        nbd_server("json:" + json.dumps(drive), at=tmp_path / "s") as uri,
        open_image(uri, active=True) as image,
    ):
        with pytest.raises(StorageError, match="s: cannot be read: Input/output error"):
            read(image)
        assert read(image) == noise(1, SIZE)


def test_server_that_dies_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with nbd_server("-f", "raw", str(path), at=tmp_path / "s") as uri:
        image = open_image(uri, active=True)
        image.write(0, b"x")
    with pytest.raises(
        StorageError, match=r"s: the (NBD server closed|connection to|server closed)"
    ):
        image.inactivate()
    assert image.active
    with pytest.raises(StorageError):
        image.close()


def test_without_the_daemon_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "disk", "qcow2")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"needs qemu-storage-daemon.*qemu-system-common"):
        open_image(path, active=False, format="qcow2")


def test_server_by_tcp(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True) as image:
        image.write(0, b"over TCP")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with subprocess.Popen(
        ["qemu-nbd", "-t", "-b", "127.0.0.1", "-p", str(port), "-x", "disk", "-f", "raw", path]
    ) as process:
        try:
            wait_until(lambda: not _refused(port))
            with open_image(f"nbd://127.0.0.1:{port}/disk", active=True) as image:
                assert read(image, 0, 8) == b"over TCP"
            with pytest.raises(StorageError, match="no such export"):
                open_image(f"nbd://127.0.0.1:{port}/other", active=False)
        finally:
            process.kill()


def _refused(port: int) -> int:

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port))
