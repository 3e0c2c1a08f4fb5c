"""Damaged and hostile checkpoint directories, found when they are opened, verified or sent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.saved import MACHINE, manifest_of, rewrite, save
from tests.migration.attempts import descriptors
from tests.migration.machines import PAGE_SIZE
from vmferry import Checkpoint, CheckpointDamaged, StorageError
from vmferry.migration.source import Source
from vmferry.transports import connect


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "vm")


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "vm"))


FILES = [
    "ram/00-pc.ram.raw",
    "ram/00-pc.ram.sums",
    "ram/01-pc.rom.raw",
    "devices.bin",
    "description.json",
    "bitmaps.bin",
    "disks/00-drive0.raw",
    "disks/00-drive0.sums",
]


def test_the_files_are_those(original: Path) -> None:
    files = {str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()}
    assert files == {*FILES, "ram/01-pc.rom.sums", "manifest.json"}


def test_content_is_that_of_the_machine(original: Path) -> None:
    for number, content in enumerate(MACHINE.memories.values()):
        (path,) = original.glob(f"ram/{number:02}-*.raw")
        assert path.read_bytes() == content
    assert (original / "disks/00-drive0.raw").read_bytes() == MACHINE.images["drive0"]


def test_zero_pages_are_holes(original: Path) -> None:
    status = (original / "ram/01-pc.rom.raw").stat()
    assert status.st_size == 4 * PAGE_SIZE
    assert status.st_blocks == 0


def test_nobody_else_may_read_it(original: Path) -> None:
    for path in (original, *original.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_found_by_verify(directory: Path, name: str) -> None:
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 4
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointDamaged, match=name.replace(".", r"\.")):
        Checkpoint(directory, verify=True)


@pytest.mark.parametrize("page", [0, 150, 299, 320, 340])
def test_damaged_page_is_named(directory: Path, page: int) -> None:
    with (directory / "ram/00-pc.ram.raw").open("r+b") as file:
        file.seek(page * PAGE_SIZE + 4095)
        last = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last[0] ^ 1]))
    Checkpoint(directory).close()
    with pytest.raises(CheckpointDamaged, match=f"the page at {page * PAGE_SIZE:#x} is damaged"):
        Checkpoint(directory, verify=True)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_found_by_opening(directory: Path, name: str, change: int) -> None:
    size = (directory / name).stat().st_size
    os.truncate(directory / name, size + change)
    with pytest.raises(CheckpointDamaged, match=f"expected {size} bytes, found {size + change}"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_found_by_opening(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(StorageError, match="No such file"):
        Checkpoint(directory)


def test_swapped_files_are_found_by_verify(directory: Path) -> None:
    shutil.copy(directory / "ram/00-pc.ram.raw", directory / "copy")
    with (directory / "ram/00-pc.ram.raw").open("r+b") as file:
        first = file.read(PAGE_SIZE)
        second = file.read(PAGE_SIZE)
        file.seek(0)
        file.write(second + first)
    with pytest.raises(CheckpointDamaged, match="the page at 0x0 is damaged"):
        Checkpoint(directory, verify=True)


def link(path: Path) -> None:
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", ["manifest.json", *FILES])
@pytest.mark.parametrize("change", [link, pipe, folder, device, loop], ids=lambda f: f.__name__)
def test_only_plain_files_are_opened(
    directory: Path, name: str, change: Callable[[Path], None]
) -> None:
    change(directory / name)
    with pytest.raises(CheckpointDamaged, match="expected a plain file in the checkpoint"):
        Checkpoint(directory)


@pytest.mark.parametrize("name", ["ram", "disks"])
def test_folder_may_not_lead_out_of_the_checkpoint(directory: Path, name: str) -> None:
    (directory / name).rename(directory.parent / "outside")
    (directory / name).symlink_to(directory.parent / "outside")
    with pytest.raises(CheckpointDamaged, match="expected a plain file in the checkpoint"):
        Checkpoint(directory)


def test_the_directory_itself_may_be_a_link(directory: Path) -> None:
    (directory.parent / "link").symlink_to(directory)
    Checkpoint(directory.parent / "link", verify=True).close()


def test_survey_of_a_directory_with_other_things_in_it_counts_its_own_files(
    directory: Path,
) -> None:
    with Checkpoint(directory) as checkpoint:
        size = checkpoint.survey().size
    (directory / "notes").write_bytes(bytes(1 << 20))
    (directory / "again").symlink_to(directory)
    os.mkfifo(directory / "pipe")
    with Checkpoint(directory) as checkpoint:
        assert checkpoint.survey().size == size


def send(checkpoint: Checkpoint, out: Path) -> None:
    Source(checkpoint, lambda _: connect(f"file:{out}")).run()


@pytest.mark.parametrize("name", ["ram/00-pc.ram.raw", "disks/00-drive0.raw"])
def test_file_that_shrinks_while_it_is_sent_is_a_clear_error(directory: Path, name: str) -> None:
    with Checkpoint(directory) as checkpoint:
        os.truncate(directory / name, 2 * PAGE_SIZE)
        with pytest.raises(CheckpointDamaged, match="shorter than"):
            send(checkpoint, directory.parent / "out")


@pytest.mark.parametrize("name", ["devices.bin", "bitmaps.bin", "ram/00-pc.ram.sums"])
def test_file_that_changes_after_opening_is_not_sent(directory: Path, name: str) -> None:
    with Checkpoint(directory) as checkpoint:
        with (directory / name).open("r+b") as file:
            file.write(b"\x99")
        with pytest.raises(CheckpointDamaged, match="does not match its checksum"):
            send(checkpoint, directory.parent / "out")


def test_file_that_grows_endlessly_after_opening_is_not_read_whole(directory: Path) -> None:
    with Checkpoint(directory) as checkpoint:
        os.truncate(directory / "devices.bin", 1 << 40)
        with pytest.raises(CheckpointDamaged, match="does not match its checksum"):
            _ = checkpoint.devices


def test_files_are_given_back(directory: Path) -> None:
    before = descriptors()
    with Checkpoint(directory, verify=True) as checkpoint:
        memory = checkpoint.memory(checkpoint.blocks[0])
        assert descriptors() != before
    assert descriptors() == before
    assert memory is not None
    with pytest.raises(StorageError, match="cannot be read"):
        memory.read(0, memoryview(bytearray(PAGE_SIZE)))


def test_device_that_is_not_where_the_manifest_says_is_not_sent(directory: Path) -> None:
    manifest = manifest_of(directory)
    manifest["sections"][0]["instance"] = 5
    rewrite(directory, manifest)
    with (
        Checkpoint(directory) as checkpoint,
        pytest.raises(CheckpointDamaged, match="timer is not where the manifest says"),
    ):
        send(checkpoint, directory.parent / "out")


def test_pages_that_are_counted_wrong_are_found_by_verify(directory: Path) -> None:
    manifest = manifest_of(directory)
    manifest["ram"][0]["data_pages"] -= 1
    manifest["ram"][0]["zero_pages"] += 1
    rewrite(directory, manifest)
    with pytest.raises(CheckpointDamaged, match="expected 300 pages with data, found 301"):
        Checkpoint(directory, verify=True)


def test_data_in_the_place_of_a_hole_is_found_by_verify(directory: Path) -> None:
    with (directory / "ram/01-pc.rom.raw").open("r+b") as file:
        file.seek(3 * PAGE_SIZE)
        file.write(b"x")
    with pytest.raises(CheckpointDamaged, match="the page at 0x3000 is damaged"):
        Checkpoint(directory, verify=True)


def test_hole_in_the_place_of_data_is_found_by_verify(directory: Path) -> None:
    path = directory / "ram/00-pc.ram.raw"
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(len(content))
        file.seek(20 * PAGE_SIZE)
        file.write(content[20 * PAGE_SIZE :])
    with pytest.raises(CheckpointDamaged, match="the page at 0x0 is damaged"):
        Checkpoint(directory, verify=True)
