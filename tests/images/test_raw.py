"""Raw files and devices: holes, sizes, full disks, and what vanishes while it is open."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.support import SIZE, block_device, make, noise, on_small_file_system, read
from vmferry.errors import StorageError, UsageError
from vmferry.images import Extent, open_image


def stored(path: Path) -> int:
    """Bytes of storage that the file takes."""
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("direct", [False, True])
def test_holes_stay_holes(tmp_path: Path, direct: bool) -> None:
    path = _file(tmp_path)
    with open_image(path, active=True, direct=direct) as image:
        assert list(image.allocated()) == []
        image.write(1 << 20, noise(1, 1 << 20))
        image.flush()
        assert list(image.allocated()) == [Extent(1 << 20, 1 << 20)]
        assert list(image.allocated(3 << 19, 4096)) == [Extent(3 << 19, 4096)]
        assert stored(path) < 3 << 19
        image.write_zeroes((1 << 20) + 65536, (1 << 20) - 65536)
        assert list(image.allocated()) == [Extent(1 << 20, 65536)]
        image.write_zeroes(0, SIZE, unmap=False)
        image.flush()
        assert stored(path) >= SIZE
        image.discard(0, SIZE)
        assert list(image.allocated()) == []
        assert stored(path) < 65536
    assert path.stat().st_size == SIZE
    assert path.read_bytes() == bytes(SIZE)


def test_zeroes_where_there_are_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("vmferry.images.holes._allocate", without)
    path = _file(tmp_path)
    with open_image(path, active=True) as image:
        image.write(0, b"x" * SIZE)
        image.write_zeroes(1000, 2 << 20)
        image.discard(0, 100)
    content = path.read_bytes()
    assert content[100:] == b"x" * 900 + bytes(2 << 20) + b"x" * (SIZE - 1000 - (2 << 20))


def test_image_of_any_size(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"0123456789")
    with open_image(path, active=True) as image:
        assert image.size == 10
        image.write(9, b"X")
        assert read(image) == b"012345678X"
        image.resize(12)
        assert read(image) == b"012345678X\0\0"
        image.resize(0)
        assert list(image.allocated()) == []
        with pytest.raises(UsageError, match="a size of 0 bytes or more"):
            image.resize(-1)
    path.write_bytes(b"0123456789")
    with pytest.raises(StorageError, match="expected a size in blocks of"):
        open_image(path, active=True, direct=True)


def test_file_that_is_cut_while_open_is_told_of(tmp_path: Path) -> None:
    path = _file(tmp_path)
    with open_image(path, active=True) as image:
        os.truncate(path, 1 << 20)
        with pytest.raises(StorageError, match=f"{path}: expected {SIZE} bytes, found its end"):
            read(image, 0, 2 << 20)


def test_what_is_no_image(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null")):
        for active in (True, False):
            with pytest.raises(StorageError, match="expected a file or a block device"):
                open_image(path, active=active)
    with pytest.raises(StorageError, match="directory"):
        open_image(tmp_path, active=False)


def test_file_without_permission_is_found_while_nothing_depends_on_it(tmp_path: Path) -> None:
    path = _file(tmp_path)
    # As an ordinary user, for to the superuser all is permitted.
    script = (
        "import os, sys; from vmferry.images import open_image\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "open_image(sys.argv[1], active=False, read_only=True).close()\n"
        "open_image(sys.argv[1], active=False)\n"
    )
    path.chmod(0o444)
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=False
    )
    assert f"StorageError: {path}: cannot be opened: Permission denied" in done.stderr
    assert "line 4" in done.stderr


def test_full_disk(tmp_path: Path) -> None:
    script = (
        "import os, sys; from vmferry.images import open_image\n"
        "with open(sys.argv[1], 'wb') as file: file.truncate(8 << 20)\n"
        "image = open_image(sys.argv[1], active=True)\n"
        "image.write(0, b'fits')\n"
        "try: image.write(0, b'x' * (8 << 20))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "image.inactivate(); print('inactive')\n"
    )
    output = on_small_file_system(tmp_path, script)
    assert output == (
        f"StorageError {tmp_path}/disk: cannot be written: No space left on device; "
        "free some space or choose another file system\ninactive\n"
    )


@pytest.mark.parametrize("direct", [False, True])
def test_block_device(tmp_path: Path, direct: bool) -> None:
    with block_device(_file(tmp_path)) as device:
        with open_image(device, active=True, direct=direct) as image:
            assert image.size == SIZE
            image.write(1000, noise(1, 100_000))
            image.write_zeroes(4096, 8192)
            image.discard(1 << 20, 1 << 20)
            with pytest.raises(StorageError, match="cannot be resized: it is a device"):
                image.resize(SIZE)
            assert [extent.length for extent in image.allocated()] == [SIZE]
        expected = bytearray(SIZE)
        expected[1000:101_000] = noise(1, 100_000)
        expected[4096:12288] = bytes(8192)
        with open_image(device, active=False, direct=True) as image:
            assert read(image) == expected


def test_device_that_fails(tmp_path: Path) -> None:
    path = _file(tmp_path)
    with block_device(path) as device, open_image(device, active=True) as image:
        os.truncate(path, 1 << 20)
        with pytest.raises(StorageError, match=f"{device}: cannot be read: Input/output error"):
            read(image, 2 << 20, 4096)
        os.truncate(path, SIZE)


def _file(directory: Path) -> Path:
    path = directory / "disk"
    path.touch()
    os.truncate(path, SIZE)
    return path


@pytest.mark.qemu
def test_comma_and_blank_in_a_name(tmp_path: Path) -> None:
    for form in ("raw", "qcow2"):
        path = make(tmp_path / f"a, b=c {form}", form)
        with open_image(path, active=True, format=form) as image:
            image.write(0, b"x")


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NBD server's business"):
        open_image("nbd://host/disk", active=False, format="qcow2")
    with pytest.raises(UsageError, match="qcow2 image cannot be shared"):
        open_image(tmp_path, active=False, format="qcow2", share_write=True)


@pytest.mark.parametrize("size", [0, 4096, SIZE - 512])
def test_what_was_cut_off_is_no_hole(tmp_path: Path, size: int) -> None:
    """Whoever copies the image would make zeroes of it."""
    path = make(tmp_path / "image", "raw")
    with open_image(path, active=True) as image:
        image.write(0, noise(1, SIZE // 2))
        os.truncate(path, size)
        with pytest.raises(StorageError, match="cut while it was open"):
            list(image.allocated())
        os.truncate(path, SIZE)
        assert sum(extent.length for extent in image.allocated()) <= SIZE // 2
