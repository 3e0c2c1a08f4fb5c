"""What is inactive stays as it is, however this process ends; and all images change together."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.images.support import (
    KINDS,
    SIZE,
    children,
    digest,
    has_ended,
    kind,
    make,
    noise,
    owner,
    qemu_img,
    qemu_io,
    read,
    wait_until,
)
from vmferry.errors import ImageLocked, StorageError
from vmferry.images import Image, activate_all, inactivate_all, open_image

pytestmark = pytest.mark.qemu

FORMS = ["raw", "qcow2", "vmdk"]


def facts(path: Path) -> tuple[str, int]:
    """The content of the file, and when it was last written."""
    return digest(path), path.stat().st_mtime_ns


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_written_between_inactivation_and_activation(tmp_path: Path, form: str) -> None:
    path = make(tmp_path / "disk", form)
    with open_image(path, active=True, format=form) as image:
        image.write(0, noise(1, 200_000))
        image.inactivate()
        before = facts(path)
        assert not children(os.getpid())
        image.close()
    assert facts(path) == before
    if form == "qcow2":
        qemu_img("check", "-q", str(path))


ENDINGS = {
    "returns": "sys.exit(0)",
    "fails": "raise SystemError",
    "at once": "os._exit(1)",
    "SIGTERM": "os.kill(os.getpid(), signal.SIGTERM)",
    "SIGINT": "os.kill(os.getpid(), signal.SIGINT)",
    "SIGINT of its group": "os.killpg(0, signal.SIGINT)",
    "SIGKILL": "os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_no_end_of_the_process_writes_to_an_inactive_image(
    tmp_path: Path, form: str, ending: str
) -> None:
    path = make(tmp_path / "disk", form)
    then = f"image.inactivate()\nprint('ready', flush=True)\ninput()\n{ending}"
    with owner(path, form, then) as process:
        before = facts(path)
        with open_image(path, active=True, format=form) as image:  # nobody has it
            assert read(image, 4096, 5000) == b"owner" * 1000
        mine = facts(path)
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(30)
    assert facts(path) == mine
    assert mine[0] == before[0] or form == "qcow2"


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_killed_owner_leaves_the_image_to_others_and_writes_nothing_late(
    tmp_path: Path, form: str
) -> None:
    path = make(tmp_path / "disk", form)
    with owner(path, form, "image.flush()\nimage.write(0, b'not flushed')") as process:
        helpers = children(process.pid)
        assert len(helpers) == (form != "raw")
        with pytest.raises(ImageLocked):
            open_image(path, active=True, format=form)
        process.kill()
        process.wait()
        for helper in helpers:
            wait_until(lambda helper=helper: has_ended(helper))
        before = facts(path)
    assert facts(path) == before
    with open_image(path, active=True, format=form) as image:
        assert read(image, 4096, 5000) == b"owner" * 1000


def test_ctrl_c_does_not_reach_the_daemon(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "qcow2")
    with owner(path, "qcow2", "signal.signal(signal.SIGINT, signal.SIG_IGN)") as process:
        (helper,) = children(process.pid)
        assert os.getpgid(helper) != process.pid
        os.killpg(process.pid, signal.SIGINT)
        with pytest.raises(ImageLocked):
            open_image(path, active=True, format="qcow2")


def test_activation_reads_size_and_metadata_anew(tmp_path: Path) -> None:
    for form in FORMS[:2]:
        path = make(tmp_path / form, form)
        with open_image(path, active=False, format=form) as image:
            assert image.size == SIZE
            qemu_img("resize", "-q", "-f", form, str(path), str(2 * SIZE))
            qemu_io(path, f"write -P 7 {SIZE} 64k", form)
            image.activate()
            assert image.size == 2 * SIZE
            assert read(image, SIZE, 65536) == b"\x07" * 65536


def test_failed_flush_keeps_the_image_and_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = _raw(tmp_path / "disk")
    image.write(0, b"x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", _fail)
        with pytest.raises(StorageError, match="disk: cannot be flushed: Input/output error"):
            image.inactivate()
    assert image.active
    for again in (image.flush, image.inactivate, image.close):
        with pytest.raises(StorageError, match="writes before were lost"):
            again()
    assert not image.active


def test_all_or_none_are_inactivated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fdatasync
    images = [_raw(tmp_path / name) for name in "abc"]
    inactive = open_image(make(tmp_path / "d", "raw"), active=False)
    images.insert(1, inactive)

    def fail_for_b(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").readlink().name == "b":
            _fail(fd)
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail_for_b)
        with pytest.raises(StorageError, match="b: cannot be flushed"):
            inactivate_all(images)
    assert [image.active for image in images] == [True, False, True, True]
    images[0].write(0, b"goes on")
    for image in images:
        if not image.name.endswith("b"):
            image.close()
    with pytest.raises(StorageError):
        images[2].close()


@pytest.mark.parametrize("name", KINDS)
def test_all_change_sides(tmp_path: Path, name: str) -> None:
    with kind(name, tmp_path) as found:
        images = [found.open(active=True), _raw(tmp_path / "other")]
        inactivate_all(images)
        assert not any(image.active for image in images)
        activate_all(images)
        assert all(image.active for image in images)
        for image in images:
            image.close()


def test_image_taken_meanwhile_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _raw(tmp_path / "first"), _raw(tmp_path / "second")
    thief: list[Image] = []

    def steal(_: int) -> None:
        if not first.active and not thief:
            thief.append(open_image(first.name, active=True))
            _fail(_)

    monkeypatch.setattr(os, "fdatasync", steal)
    with pytest.raises(StorageError, match="second: cannot be flushed") as caught:
        inactivate_all([first, second])
    assert any("first" in note and "lock" in note for note in caught.value.__notes__)
    assert not first.active
    assert second.active
    thief[0].close()
    first.close()
    with pytest.raises(StorageError):
        second.close()


def test_all_or_none_are_activated(tmp_path: Path) -> None:
    paths = [make(tmp_path / name, "raw") for name in "abc"]
    images = [open_image(path, active=False) for path in paths]
    with open_image(paths[1], active=True):
        with pytest.raises(ImageLocked, match='b: failed to get the "write" lock'):
            activate_all(images)
        assert not any(image.active for image in images)
    activate_all(images)
    for image in images:
        image.close()


def test_daemon_that_cannot_finish_the_image_fails_the_inactivation(tmp_path: Path) -> None:
    path = make(tmp_path / "disk", "qcow2")
    with open_image(path, active=True, format="qcow2") as image:
        image.write(0, b"x")
        for child in children(os.getpid()):
            os.kill(child, signal.SIGKILL)
        with pytest.raises(StorageError, match="disk: qemu-storage-daemon ended with status -9"):
            image.inactivate()
        assert image.active
        with pytest.raises(StorageError, match="disk: qemu-storage-daemon ended with status -9"):
            image.close()
        assert not image.active


def _raw(path: Path) -> Image:
    return open_image(make(path, "raw"), active=True)


def _fail(_: Any) -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("replaced", [False, True])
def test_file_without_its_name_is_not_let_go_of(tmp_path: Path, form: str, replaced: bool) -> None:
    """Its content would be gone for good: what is open is all that there is of it."""
    path = make(tmp_path / "disk", form)
    with open_image(path, active=True, format=form) as image:
        image.write(0, b"precious")
        path.rename(tmp_path / "moved")
        if replaced:
            make(path, form)
        with pytest.raises(StorageError, match=f"{path}: the file was removed or replaced"):
            image.inactivate()
        assert image.active
        assert read(image, 0, 8) == b"precious"
        (tmp_path / "moved").rename(path)
        image.inactivate()
        image.activate()
        assert read(image, 0, 8) == b"precious"
