"""What was changed of an image that is being copied while it is used."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images.support import SIZE, Kind, noise, read
from vmferry.errors import StorageError, UsageError
from vmferry.images import Image, open_image
from vmferry.images.changes import CHUNK, ChangeLog

pytestmark = pytest.mark.qemu


@pytest.mark.parametrize(
    "change",
    [
        lambda image, at, length: image.write(at, bytes(length)),
        lambda image, at, length: image.write_zeroes(at, length),
        lambda image, at, length: image.discard(at, length),
    ],
    ids=["write", "write_zeroes", "discard"],
)
def test_changed_chunks_are_told_once(
    any_kind: Kind, change: Callable[[Image, int, int], None]
) -> None:
    with any_kind.open(active=True) as image:
        change(image, 0, 4096)  # before anybody asked
        with image.log_changes() as log:
            assert log.take() == []
            change(image, CHUNK - 4096, 8192)
            change(image, 3 * CHUNK, 4096)
            change(image, 2 * CHUNK, 0)
            assert log.pending == 3 * CHUNK
            assert log.take() == [0, 1, 3]
            assert log.pending == 0
            assert log.take() == []
            read(image)
            assert log.take() == []
        change(image, 2 * CHUNK, 4096)
        assert log.take() == []


def test_what_another_side_may_have_changed_counts_as_changed(any_kind: Kind) -> None:
    with any_kind.open(active=True) as image, image.log_changes() as log:
        image.inactivate()
        assert log.take() == []
        image.activate()
        assert log.pending == image.size
        image.activate()
        assert log.take() == list(range(image.size // CHUNK))
        assert log.take() == []


def test_each_log_has_its_own(any_kind: Kind) -> None:
    with any_kind.open(active=True) as image, image.log_changes() as one:
        image.write(0, b"x")
        with image.log_changes() as other:
            image.write(CHUNK, b"x")
            assert other.take() == [1]
        image.write(2 * CHUNK, b"x")
        assert one.take() == [0, 1, 2]
        with pytest.raises(UsageError, match="its changes are being noted"):
            image.resize(2 * SIZE)


def test_write_that_failed_may_have_been_done(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with open_image(path, active=True) as image, image.log_changes() as log:
        with pytest.raises(StorageError):
            image.write(SIZE - 512, bytes(1024))  # beyond the end: refused, nothing was tried
        assert log.take() == []
        access = image._access  # type: ignore[attr-defined]
        write = access.write

        def fail(offset: int, views: list[memoryview], **_: object) -> None:
            write(offset, views[:1])
            raise OSError(5, "stands for a disk that breaks")

        access.write = fail
        with pytest.raises(StorageError):
            image.write(CHUNK, b"done", b"not done")
        access.write = write
        assert log.take() == [1]


@settings(max_examples=200)
@given(
    st.integers(1, 5 * CHUNK),
    st.lists(st.tuples(st.integers(0, 5 * CHUNK), st.integers(0, 2 * CHUNK)), max_size=6),
)
def test_any_changes_mark_the_chunks_that_they_touch(
    size: int, changes: list[tuple[int, int]]
) -> None:
    log = ChangeLog(size, lambda _: None)
    expected = set[int]()
    for start, most in changes:
        offset = min(start, size)
        length = min(most, size - offset)
        log.note(offset, length)
        if length:
            expected |= set(range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))
    assert log.pending == sum(min(CHUNK, size - number * CHUNK) for number in expected)
    assert log.take() == sorted(expected)


def test_copy_of_an_image_whose_writers_never_rest(tmp_path: Path) -> None:
    """Nothing is lost between the look at the log and the read of what it told."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes(bytes(SIZE))
    there.write_bytes(bytes(SIZE))
    done = threading.Event()

    def work(image: Image, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311
        while not done.is_set():
            offset = chance.randrange(SIZE // 512) * 512
            image.write(offset, noise(chance.randrange(1000), min(8192, SIZE - offset)))

    with open_image(here, active=True) as image, open_image(there, active=True) as copy:
        with image.log_changes() as log:
            log.note(0, SIZE)
            writers = [threading.Thread(target=work, args=(image, seed)) for seed in range(3)]
            for writer in writers:
                writer.start()
            for turn in range(40):
                if turn == 39:
                    done.set()
                    for writer in writers:
                        writer.join()
                for number in log.take():
                    copy.write(number * CHUNK, read(image, number * CHUNK, CHUNK))
        assert read(copy) == read(image)


def test_change_that_is_being_made_is_told_behind_it(tmp_path: Path) -> None:
    """Somebody asks the log, and reads, in the middle of a write."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with open_image(path, active=True) as image, image.log_changes() as log:
        access = image._access  # type: ignore[attr-defined]
        write = access.write
        seen = []

        def slowly(*what: Any, **how: Any) -> None:
            seen.append((log.take(), read(image, 0, 3)))
            write(*what, **how)

        access.write = slowly
        image.write(0, b"new")
        image.write(0, b"yet")
        assert seen == [([], bytes(3)), ([0], b"new")]
        assert log.take() == [0]
