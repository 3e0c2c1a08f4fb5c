"""One call for every form: it leaves a whole file, or none."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.checkpoint.machines import MIB, PAGE, Saved
from tests.support.recorded import recorded
from vmferry import Checkpoint, receive
from vmferry.checkpoint.export import FORMS, convert
from vmferry.errors import CheckpointDamaged, StorageError, StreamError, UsageError
from vmferry.migration.progress import Progress

SAVED = Saved(
    blocks={"microvm.ram": 16 * MIB, "pc.bios": 64 << 10, "/rom@etc/acpi/tables": PAGE},
    pages={("microvm.ram", 0): b"first", ("microvm.ram", 16 * MIB - PAGE): b"last"},
)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A stream of a real machine."""
    path = tmp_path / "stream"
    path.write_bytes(recorded("microvm")[0].sent)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """A name for the result; what was written aside must be gone when the test is over."""
    directory = tmp_path / "out"
    directory.mkdir()
    yield directory / "result"
    assert {path.name for path in directory.iterdir()} <= {"result"}


def test_raw_is_memory_with_holes_where_there_is_none(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()
    convert(tmp_path / "checkpoint", "raw", out)
    assert out.stat().st_size == 4 << 30
    assert out.stat().st_blocks * 512 <= 64 << 10
    with out.open("rb") as file:
        assert file.read(PAGE).rstrip(b"\0") == b"first"
        file.seek(16 * MIB - PAGE)
        assert file.read(2 * PAGE).rstrip(b"\0") == b"last"


def test_blocks_that_have_no_place_are_told(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()
    exported = convert(str(tmp_path / "checkpoint"), "raw", str(out))
    assert exported.path == out
    assert [block.name for block in exported.left_out] == ["/rom@etc/acpi/tables"]


def test_result_is_for_its_owner_only(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()
    convert(tmp_path / "checkpoint", "raw", out)
    assert out.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("form", FORMS)
def test_stream_file_and_its_checkpoint_give_the_same(
    form: str, recording: Path, tmp_path: Path, out: Path
) -> None:
    receive(f"file:{recording}", tmp_path / "checkpoint").close()
    convert(recording, form, out)
    other = tmp_path / "other"
    convert(tmp_path / "checkpoint", form, other)
    assert out.stat().st_size == other.stat().st_size
    if form != "raw":
        assert out.read_bytes() == other.read_bytes()


def test_stream_has_the_machine_that_it_was_made_from(
    recording: Path, tmp_path: Path, out: Path
) -> None:
    convert(recording, "stream", out)
    with (
        receive(f"file:{recording}", tmp_path / "a") as before,
        receive(f"file:{out}", tmp_path / "b") as after,
    ):
        assert after.devices == before.devices
        assert after.description == before.description
        assert after.blocks == before.blocks
        for block in before.blocks:
            one, other = before.memory(block), after.memory(block)
            assert one is not None
            assert other is not None
            assert (one.sums == other.sums).all()


def test_stream_may_come_in_on_standard_input(recording: Path, out: Path) -> None:
    program = """
import sys
from vmferry.checkpoint.export import convert
convert("-", "raw", sys.argv[1])
"""
    with recording.open("rb") as stream:
        subprocess.run([sys.executable, "-c", program, str(out)], stdin=stream, check=True)
    assert out.stat().st_size == 4 << 30


def test_progress_ends_with_all_of_memory(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()
    reports: list[Progress] = []
    convert(tmp_path / "checkpoint", "raw", out, progress=reports.append)
    last = reports[-1]
    assert (last.phase, last.transferred) == ("completed", last.ram_total)
    assert last.ram_total == 16 * MIB + (64 << 10)


@pytest.mark.parametrize("form", FORMS)
def test_result_that_exists_is_left_alone(form: str, recording: Path, out: Path) -> None:
    out.write_bytes(b"mine")
    with pytest.raises(StorageError, match="exists already; choose a new name"):
        convert(recording, form, out)
    assert out.read_bytes() == b"mine"


def test_result_that_comes_up_meanwhile_is_left_alone(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()

    def interfere(_: Progress) -> None:
        out.write_bytes(b"mine")

    with pytest.raises(StorageError, match="exists already"):
        convert(tmp_path / "checkpoint", "raw", out, progress=interfere)
    assert out.read_bytes() == b"mine"


def test_dangling_link_is_not_followed(tmp_path: Path, out: Path) -> None:
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="exists already"):
        convert(tmp_path, "raw", out)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("form", FORMS)
def test_bad_stream_leaves_nothing(form: str, recording: Path, out: Path) -> None:
    recording.write_bytes(recording.read_bytes()[:100_000])
    with pytest.raises(StreamError):
        convert(recording, form, out)
    assert not out.exists()


def test_interrupt_leaves_nothing(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "checkpoint", "raw", out, progress=interrupt)
    assert not out.exists()


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file may become larger, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("form", FORMS)
def test_file_that_cannot_be_written_leaves_nothing(
    form: str, recording: Path, tmp_path: Path, out: Path
) -> None:
    receive(f"file:{recording}", tmp_path / "checkpoint").close()
    with room(64 << 10), pytest.raises(StorageError):
        convert(tmp_path / "checkpoint", form, out)
    assert not out.exists()


def test_missing_source_and_directory_are_named(tmp_path: Path, out: Path) -> None:
    with pytest.raises(StorageError, match="nothing-here"):
        convert(tmp_path / "nothing-here", "raw", out)
    with pytest.raises(StorageError, match="nowhere/result: cannot be created"):
        convert(tmp_path, "raw", tmp_path / "nowhere" / "result")
    with pytest.raises(StorageError, match="not a checkpoint"):
        convert(tmp_path, "raw", out)


def test_form_must_be_one_of_those_known(tmp_path: Path, out: Path) -> None:
    with pytest.raises(UsageError, match='expected one of raw, elf-core, stream; found "iso"'):
        convert(tmp_path, "iso", out)


def test_path_that_a_uri_cannot_hold_is_refused(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a,offset=5"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="offset"):
        convert(path, "raw", out)


def test_block_file_cut_after_opening_is_damage(tmp_path: Path, out: Path) -> None:
    SAVED.checkpoint(tmp_path).close()
    with Checkpoint(tmp_path / "checkpoint") as checkpoint:
        memory = checkpoint.memory(checkpoint.blocks[0])
        assert memory is not None
    os.truncate(memory.path, PAGE)
    with pytest.raises(CheckpointDamaged):
        convert(tmp_path / "checkpoint", "raw", out)
    assert not out.exists()


def test_memory_beyond_the_limit_is_refused(recording: Path, out: Path) -> None:
    with pytest.raises(StreamError, match="max"):
        convert(recording, "raw", out, max_ram=MIB)
    assert not out.exists()
