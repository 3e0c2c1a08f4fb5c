"""Copying between files keeps every byte and every hole, whatever the file systems can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmferry.checkpoint.export.copy import copy_sparse

PAGE = 4096


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def in_memory() -> Iterator[int]:
    """A file of another file system than any directory's: the kernel copies nothing to it."""
    fd = os.memfd_create("target")
    try:
        yield fd
    finally:
        os.close(fd)


def fill(fd: int, pages: list[bool]) -> bytes:
    """Pages of data and holes; what is then in the file."""
    os.ftruncate(fd, len(pages) * PAGE)
    for number, is_data in enumerate(pages):
        if is_data:
            os.pwrite(fd, bytes([number % 255 + 1]) * PAGE, number * PAGE)
    return os.pread(fd, len(pages) * PAGE, 0)


@pytest.mark.parametrize("target", ["file", "memory"])
@given(
    pages=st.lists(st.booleans(), min_size=1, max_size=24),
    cut=st.tuples(st.integers(0, 24 * PAGE), st.integers(0, 24 * PAGE)),
    to=st.integers(0, 3 * PAGE),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_copy_has_the_bytes_of_the_source(
    target: str, pages: list[bool], cut: tuple[int, int], to: int, tmp_path: Path
) -> None:
    for name in ("source", "target"):
        (tmp_path / name).unlink(missing_ok=True)
    start, end = sorted(min(edge, len(pages) * PAGE) for edge in cut)
    passed: list[int] = []
    other = in_memory() if target == "memory" else opened(tmp_path / "target")
    with opened(tmp_path / "source") as source, other as copy:
        content = fill(source, pages)
        os.ftruncate(copy, to + end - start)
        copy_sparse(source, start, end - start, copy, to, passed.append)
        assert os.pread(copy, 1 << 20, 0) == bytes(to) + content[start:end]
    assert sum(passed) == end - start


def test_holes_take_no_room_in_the_copy(tmp_path: Path) -> None:
    size = 1 << 30
    with opened(tmp_path / "source") as source, opened(tmp_path / "copy") as copy:
        os.ftruncate(source, size)
        os.pwrite(source, b"x" * PAGE, size // 2)
        os.ftruncate(copy, size)
        copy_sparse(source, 0, size, copy, 0, lambda _: None)
        assert os.fstat(copy).st_blocks * 512 <= 64 << 10


def test_source_that_is_too_short_is_noticed(tmp_path: Path) -> None:
    with opened(tmp_path / "source") as source, opened(tmp_path / "copy") as copy:
        os.ftruncate(source, PAGE)
        with pytest.raises(EOFError):
            copy_sparse(source, 0, PAGE + 1, copy, 0, lambda _: None)
