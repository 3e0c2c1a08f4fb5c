"""``file:``: offsets, what stays and what goes, and full disks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.transports.support import accepted, receive
from vmferry.errors import StorageError, UsageError
from vmferry.transports import connect, listen


def write(uri: str, data: bytes) -> None:
    with connect(uri) as sender:
        sender.send([data])
        sender.end_of_data()


def read(uri: str) -> bytes:
    with listen(uri) as listener:
        return receive(accepted(listener.accept()))


def test_new_file_is_for_its_owner_only(tmp_path: Path) -> None:
    write(f"file:{tmp_path}/f", b"memory of a guest")
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600


def test_old_content_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"something longer")
    write(f"file:{tmp_path}/f", b"short")
    assert (tmp_path / "f").read_bytes() == b"short"


def test_offset_keeps_what_is_before_and_cuts_what_is_behind(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"H" * 4096 + b"old stream" * 100)
    write(f"file:{tmp_path}/f,offset=0x1000", b"new stream")
    assert (tmp_path / "f").read_bytes() == b"H" * 4096 + b"new stream"


def test_offset_behind_the_end_leaves_a_hole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    write(f"file:{tmp_path}/f,offset=1M", b"x")
    assert (tmp_path / "f").read_bytes() == b"abc" + bytes((1 << 20) - 3) + b"x"


def test_reading_starts_at_the_offset(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"header,stream")
    assert read(f"file:{tmp_path}/f,offset=7") == b"stream"
    assert read(f"file:{tmp_path}/f,offset=1G") == b""


def test_file_that_cannot_be_opened_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r'/f": cannot be opened: No such file or directory$'):
        listen(f"file:{tmp_path}/f")
    with pytest.raises(StorageError, match=r'/no/f": cannot be opened: No such file'):
        connect(f"file:{tmp_path}/no/f")


def test_full_disk_is_a_storage_error() -> None:
    with (
        connect("file:/dev/full") as sender,
        pytest.raises(StorageError, match=r'"file:/dev/full": sending failed: No space left'),
    ):
        sender.send([b"x"])


def test_device_takes_and_gives_bytes() -> None:
    write("file:/dev/null", bytes(1 << 20))
    assert read("file:/dev/null") == b""


def test_directory_and_named_pipe_are_usage_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="found a directory"):
        listen(f"file:{tmp_path}")
    with pytest.raises(UsageError, match="found a named pipe; use exec:cat"):
        listen(f"file:{tmp_path}/fifo")


def test_writing_to_a_directory_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="Is a directory"):
        connect(f"file:{tmp_path}")


def test_failed_opening_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        with pytest.raises(UsageError):
            listen(f"file:{tmp_path}")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
