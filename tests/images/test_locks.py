"""Locks, beside the real QEMU: each keeps the other off, and both hand over."""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.images.support import make, qemu_img, qemu_io, read, wait_until
from vmferry.errors import ImageLocked
from vmferry.images import open_image
from vmferry.qemu import QemuProcess
from vmferry.qemu.qmp import QmpError

pytestmark = pytest.mark.qemu

Start = Callable[..., QemuProcess]


def held(path: Path) -> list[int]:
    """The bytes that are locked, by whomever, as the kernel lists them."""
    inode = path.stat().st_ino
    found = set[int]()
    for line in Path("/proc/locks").read_text().splitlines():
        match = re.search(
            r"OFDLCK +ADVISORY +READ +\S+ +[0-9a-f]+:[0-9a-f]+:(\d+) (\d+) (\d+)", line
        )
        if match and int(match[1]) == inode:
            found.update(range(int(match[2]), int(match[3]) + 1))
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [100, 101, 201]),
        ({"share_write": True}, [100, 101]),
        ({"read_only": True}, [100, 201]),
        ({"read_only": True, "share_write": True}, [100]),
    ],
    ids=["writable", "shared", "read-only", "read-only and shared"],
)
def test_bytes_are_those_of_qemu(
    tmp_path: Path, start_qemu: Start, options: dict[str, bool], expected: list[int]
) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True, **options) as image:
        assert held(path) == expected
        image.inactivate()
        assert held(path) == []
        image.activate()
        assert held(path) == expected
    assert held(path) == []
    _qemu(start_qemu, path, **options)
    assert held(path) == expected


def test_qemu_does_not_start_on_an_active_image(tmp_path: Path, start_qemu: Start) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True) as image:
        with pytest.raises(Exception, match=r'Failed to get "write" lock'):
            _qemu(start_qemu, path)
        assert 'Failed to get "write" lock' in qemu_io(path, "write 0 512")
        assert "read 512/512" in qemu_io(path, "read 0 512", "raw", "-r")  # it lets others write
        image.inactivate()
        assert "wrote 512/512" in qemu_io(path, "write -P 3 0 512")
        image.activate()
        assert read(image, 0, 512) == b"\x03" * 512


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_image_of_a_qemu_cannot_be_activated(tmp_path: Path, start_qemu: Start, form: str) -> None:
    path = make(tmp_path / "disk", form)
    machine = _qemu(start_qemu, path, form=form)
    with open_image(path, active=False, format=form) as image:
        with pytest.raises(ImageLocked, match=f'{path}.*"write" lock'):
            image.activate()
        assert not image.active
        machine.stop()
        image.activate()
        image.write(0, b"mine")


def test_shared_on_both_sides(tmp_path: Path, start_qemu: Start) -> None:
    path = make(tmp_path / "disk", "raw")
    _qemu(start_qemu, path, share_write=True)
    with open_image(path, active=True, share_write=True) as image:
        image.write(0, b"both")
    with pytest.raises(ImageLocked, match='failed to get the shared "write" lock'):
        open_image(path, active=True)


def test_readers_share(tmp_path: Path, start_qemu: Start) -> None:
    path = make(tmp_path / "disk", "raw")
    _qemu(start_qemu, path, read_only=True)
    with open_image(path, active=True, read_only=True):
        assert "read 512/512" in qemu_io(path, "read 0 512", "raw", "-r")
        with pytest.raises(ImageLocked, match='"write" lock'):
            open_image(path, active=True)


def test_looking_takes_no_locks(tmp_path: Path, start_qemu: Start) -> None:
    for form in ("raw", "qcow2"):
        path = make(tmp_path / form, form)
        _qemu(start_qemu, path, form=form)
        before = held(path)
        open_image(path, active=False, format=form).close()
        assert held(path) == before


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_locks_go_to_an_incoming_qemu(tmp_path: Path, start_qemu: Start, form: str) -> None:
    """The image changes sides as at a switchover: a QEMU gives it up, vmferry has it, and back."""
    path = make(tmp_path / "disk", form)
    source = _qemu(start_qemu, path, form=form)
    with open_image(path, active=False, format=form) as image:
        source.execute("stop")
        saved = tmp_path / "saved"
        source.migrate(f"exec:cat > {saved}")
        source.wait_migration()
        assert 101 not in held(path)  # QEMU has inactivated it
        image.activate()
        image.write(0, b"vmferry")
        with pytest.raises(QmpError, match='"write" lock'):
            source.execute("cont")  # the source wants it back: refused
        image.inactivate()
        target = _qemu(start_qemu, path, "-incoming", "defer", form=form)
        assert 101 not in held(path)
        target.incoming(f"exec:cat {saved}")
        target.wait_migration()
        wait_until(lambda: 101 in held(path))
        with pytest.raises(ImageLocked):
            image.activate()


def test_child_that_has_a_copy_of_the_descriptor_keeps_no_lock(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True) as image:
        (fd,) = [
            int(entry.name)
            for entry in Path("/proc/self/fd").iterdir()
            if entry.is_symlink() and entry.readlink() == path
        ]
        with subprocess.Popen(["sleep", "60"], pass_fds=[fd]) as child:
            image.inactivate()
            assert held(path) == []
            child.kill()


def test_resizing_respects_who_refuses_it(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True, share_write=True) as image, path.open("rb") as other:
        image.resize(image.size + 512)
        assert held(path) == [100, 101]
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, _byte(203))
        with pytest.raises(ImageLocked, match='"resize" lock'):
            image.resize(512)
        assert held(path) == [100, 101, 203]
        assert image.size == path.stat().st_size


def test_file_system_without_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "disk", "raw")
    real = fcntl.fcntl

    def without(fd: int, command: int, argument: Any = 0) -> Any:
        if command in {fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK}:
            raise OSError(errno.ENOLCK, "No locks available")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", without)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with open_image(path, active=True) as image:
                image.write(0, b"x")
    (record,) = caplog.records
    assert "no open-file-description locks" in record.getMessage()
    assert str(path) in record.getMessage()


def test_image_can_be_inspected_by_qemu_img_without_its_lock(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "raw")
    with open_image(path, active=True):
        assert "virtual size" in qemu_img("info", "-U", "-f", "raw", str(path))


def _byte(number: int) -> bytes:
    from vmferry.images.locks import _FLOCK  # noqa: PLC0415

    return _FLOCK.pack(fcntl.F_RDLCK, 0, number, 1, 0)


def _qemu(
    start: Start,
    path: Path,
    *more: str,
    form: str = "raw",
    share_write: bool = False,
    read_only: bool = False,
) -> QemuProcess:
    """A machine with the image on a virtio disk."""
    on = {True: "on", False: "off"}
    return start(
        *("-machine", "pc,accel=tcg", "-m", "16"),
        *("-drive", f"if=none,id=d,format={form},file={path},read-only={on[read_only]}"),
        *("-device", f"virtio-blk-pci,drive=d,share-rw={on[share_write]}"),
        *more,
    )
