"""Writing a checkpoint where that cannot be done, or not to the end: nothing half-made stays."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint.saved import MACHINE, stream
from tests.migration.attempts import descriptors
from tests.migration.machines import PAGE_SIZE
from vmferry import (
    Checkpoint,
    CheckpointIncomplete,
    LimitExceeded,
    StorageError,
    receive,
)
from vmferry.checkpoint import manifest, writer
from vmferry.checkpoint.writer import CheckpointWriter
from vmferry.pages import PAGE, rows_of
from vmferry.wire import limits
from vmferry.wire.bitmap import BitmapBits, BitmapComplete, BitmapRecord, BitmapStart
from vmferry.wire.devices import DeviceSection
from vmferry.wire.disk import DiskChunk
from vmferry.wire.layout import BitmapFlag
from vmferry.wire.ram import RamBlock, RamBlocks, RamPages

RAM = RamBlock("pc.ram", 16 * PAGE_SIZE)
MIB = 1 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return stream(tmp_path / "stream")


def filled(directory: Path) -> CheckpointWriter:
    """A writer that was given memory."""
    made = CheckpointWriter(directory)
    made.__enter__()
    made.configuration(None, PAGE_SIZE)
    made.ram_blocks(RamBlocks((RAM,)))
    return made


def pages(*numbers: int) -> RamPages:
    words = np.array(numbers, np.uint64) * np.uint64(PAGE_SIZE) | np.uint64(PAGE)
    rows = rows_of(words, np.zeros(len(numbers), np.uint64), PAGE_SIZE)
    return RamPages(RAM, rows, memoryview(b"\7" * PAGE_SIZE), PAGE_SIZE)


# Where it may be written


def test_empty_directory_is_used_and_stays_after_a_failure(tmp_path: Path, source: Path) -> None:
    (tmp_path / "vm").mkdir()
    with pytest.raises(ZeroDivisionError), CheckpointWriter(tmp_path / "vm"):
        raise ZeroDivisionError
    assert list((tmp_path / "vm").iterdir()) == []
    receive(f"file:{source}", tmp_path / "vm").close()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.partial", "ram", "notes"])
def test_directory_with_anything_in_it_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / name).write_text("mine")
    with pytest.raises(StorageError, match="exists already"), CheckpointWriter(tmp_path / "vm"):
        pass
    assert (tmp_path / "vm" / name).read_text() == "mine"


def test_file_in_the_place_of_the_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "vm").write_text("mine")
    with pytest.raises(StorageError, match="exists already"), CheckpointWriter(tmp_path / "vm"):
        pass
    assert (tmp_path / "vm").read_text() == "mine"


@pytest.mark.parametrize("name", ["missing/vm", "file/vm", "dangling"])
def test_place_that_cannot_be_made_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="cannot be created"), CheckpointWriter(tmp_path / name):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_second_writer_of_one_directory_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    first = filled(tmp_path / "vm")
    with pytest.raises(StorageError), CheckpointWriter(tmp_path / "vm"):
        pass
    first.commit(frozenset(), footers=True)
    first.__exit__(None, None, None)
    Checkpoint(tmp_path / "vm", verify=True).close()


# What stays behind


def test_what_is_being_written_opens_as_incomplete(tmp_path: Path) -> None:
    made = filled(tmp_path / "vm")
    with pytest.raises(CheckpointIncomplete):
        Checkpoint(tmp_path / "vm")
    made.__exit__(None, None, None)
    assert not (tmp_path / "vm").exists()


def test_what_cannot_be_removed_opens_as_incomplete(tmp_path: Path) -> None:
    made = filled(tmp_path / "vm")
    (tmp_path / "vm" / "devices.bin").mkdir()  # in the way, and nothing unlinks it
    made.__exit__(None, None, None)
    with pytest.raises(CheckpointIncomplete):
        Checkpoint(tmp_path / "vm")
    shutil.rmtree(tmp_path / "vm")


def test_failure_behind_the_rename_takes_it_back(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def fail_at_last(path: Path) -> None:
        synced.append(path)
        if path == tmp_path / "vm" and (path / "manifest.json").exists():
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(writer, "sync_directory", fail_at_last)
    with pytest.raises(StorageError, match="cannot be completed"):
        receive(f"file:{source}", tmp_path / "vm")
    assert tmp_path in synced
    assert not (tmp_path / "vm").exists()


STEPS = ["open", "ftruncate", "fsync", "mkdir", "rename"]
"""What a writer asks of the operating system through Python; pages go another way."""


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Lets the step of a number fail as on a full disk; the steps taken so far."""

    def prepare(last: int) -> list[str]:
        taken: list[str] = []

        def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                taken.append(name)
                if len(taken) == last:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real(*arguments, **options)

            return step

        for name in STEPS:
            monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
        return taken

    yield prepare
    monkeypatch.undo()


def test_full_disk_at_any_step_leaves_nothing(
    tmp_path: Path,
    source: Path,
    failing: Callable[[int], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = descriptors()
    last = 0
    while not (tmp_path / "vm").exists():
        last += 1
        failing(last)
        with suppress(StorageError):  # none where only opening the checkpoint again is left
            receive(f"file:{source}", tmp_path / "vm").close()
        monkeypatch.undo()
        assert descriptors() == before
    assert last > 30
    Checkpoint(tmp_path / "vm", verify=True).close()


FULL = """
import resource, signal, sys
from vmferry import StorageError, receive
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    receive('file:' + sys.argv[1], sys.argv[2])
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [0, 100, PAGE_SIZE, 100 * PAGE_SIZE, 1400 << 10])
def test_files_that_may_not_grow_leave_nothing(tmp_path: Path, source: Path, most: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(source), str(tmp_path / "vm"), str(most)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert not (tmp_path / "vm").exists()


def test_full_file_system_is_told_with_advice(tmp_path: Path, source: Path) -> None:
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        with pytest.raises(StorageError, match="No space left on device; free some space"):
            receive(f"file:{source}", tmp_path / "small" / "vm")
        assert list((tmp_path / "small").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


# What a stream may ask for


def test_disks_are_bounded_all_together(tmp_path: Path) -> None:
    last = writer.MAX_DISKS // 512 - 2048
    with CheckpointWriter(tmp_path / "vm") as made:
        made.disk_chunk(DiskChunk("a", 0, None))
        with pytest.raises(LimitExceeded, match="bytes of disks"):
            made.disk_chunk(DiskChunk("b", last, None))
        made.disk_chunk(DiskChunk("b", 4096, b"\1" * MIB))
        with pytest.raises(LimitExceeded, match="bytes of disks"):
            made.disk_chunk(DiskChunk("a", last, None))


def test_sparse_disk_with_a_chunk_far_out_takes_no_room(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "vm") as made:
        made.configuration(None, PAGE_SIZE)
        made.disk_chunk(DiskChunk("a", 1 << 31, b"\1" * MIB))
        made.disk_chunk(DiskChunk("a", 0, b"\2" * MIB))
        made.commit(frozenset(), footers=True)
    with Checkpoint(tmp_path / "vm", verify=True) as checkpoint:
        ((_, disk),) = checkpoint.disks
        assert disk.size == (1 << 40) + MIB
        assert np.flatnonzero(disk.sums).tolist() == [0, 1 << 20]
        assert checkpoint.survey().size < 32 * MIB


def test_few_bytes_do_not_make_much_of_a_disk(tmp_path: Path) -> None:
    before = resident_memory()
    with CheckpointWriter(tmp_path / "vm") as made:
        made.configuration(None, PAGE_SIZE)
        for sector in (1 << shift for shift in range(12, 34)):  # up to 4 TiB: 4 million sums
            made.disk_chunk(DiskChunk("a", sector, None))
        assert resident_memory() - before < 8 * MIB
        made.commit(frozenset(), footers=True)
    assert (tmp_path / "vm/disks/00-a.sums").stat().st_blocks * 512 < MIB
    with Checkpoint(tmp_path / "vm", verify=True) as checkpoint:
        assert checkpoint.survey().size < MIB


def resident_memory() -> int:
    """Bytes of memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_devices_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICES", 1000)
    section = DeviceSection(1, "timer", 0, 1, 77, bytes(300), footer=True)
    with CheckpointWriter(tmp_path / "vm") as made:
        made.device(section, early=True)
        made.device(section, early=False)
        made.device(section, early=False)
        with pytest.raises(LimitExceeded) as caught:
            made.device(section, early=False)
    assert (caught.value.place.section, caught.value.place.offset) == ("timer", 77)


def test_bitmaps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_BITMAPS", 200)
    flags = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME
    with CheckpointWriter(tmp_path / "vm") as made:
        made.bitmap(BitmapStart("disk", "map", flags, 512, True, True))
        made.bitmap(BitmapBits("disk", "map", BitmapFlag(0), 0, 8, bytes(32)))
        with pytest.raises(LimitExceeded, match="bytes of dirty bitmaps"):
            made.bitmap(BitmapBits("disk", "map", BitmapFlag(0), 8, 800, bytes(100)))


def test_bitmaps_keep_their_names_in_any_order_of_records(tmp_path: Path) -> None:
    both = BitmapFlag.NODE_NAME | BitmapFlag.BITMAP_NAME
    none = BitmapFlag(0)
    records: list[BitmapRecord] = [
        BitmapStart("one", "map", both, 512, True, True),
        BitmapBits("one", "map", none, 0, 8, b"\1"),
        BitmapStart("two", "map", BitmapFlag.NODE_NAME, 512, False, True),
        BitmapBits("two", "map", none, 0, 8, b"\2"),
        BitmapComplete("two", "map", none),
        BitmapComplete("one", "map", BitmapFlag.NODE_NAME),
    ]
    with CheckpointWriter(tmp_path / "vm") as made:
        made.configuration(None, PAGE_SIZE)
        for record in records:
            made.bitmap(record)
        made.commit(frozenset(), footers=True)
    with Checkpoint(tmp_path / "vm") as checkpoint:
        found = list(checkpoint.bitmaps)
    assert [(r.node, r.data) for r in found if isinstance(r, BitmapBits)] == [
        ("one", b"\1"),
        ("two", b"\2"),
    ]
    assert [type(r).__name__ for r in found] == ["BitmapStart"] * 2 + ["BitmapBits"] * 2 + [
        "BitmapComplete"
    ] * 2


def test_page_that_becomes_zero_becomes_a_hole_again(tmp_path: Path) -> None:
    words = np.array([3 * PAGE_SIZE | PAGE], np.uint64)
    rows = rows_of(words, np.zeros(1, np.uint64), PAGE_SIZE)
    made = filled(tmp_path / "vm")
    made.pages(pages(1, 3))
    made.pages(RamPages(RAM, rows, memoryview(bytes(PAGE_SIZE)), PAGE_SIZE))
    made.commit(frozenset(), footers=True)
    made.__exit__(None, None, None)
    with Checkpoint(tmp_path / "vm", verify=True) as checkpoint:
        (block,) = checkpoint.manifest.ram
        assert (block.data_pages, block.zero_pages) == (1, 15)
        assert (tmp_path / "vm" / block.file).stat().st_blocks * 512 == PAGE_SIZE


def test_machine_of_the_fixture_round_trips(tmp_path: Path, source: Path) -> None:
    with receive(f"file:{source}", tmp_path / "vm") as checkpoint:
        assert checkpoint.configuration == MACHINE.configuration
        assert [r.encode() for r in checkpoint.bitmaps] == [r.encode() for r in MACHINE.bitmaps]
