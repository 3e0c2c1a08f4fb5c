"""The memory of a destination as it fills: huge pages where it is dense, small ones elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vmferry.memory import REGION, GuestMemory, MemoryBlock
from vmferry.migration.incoming import IncomingBlock
from vmferry.pages import CONTINUE, PAGE, ZERO, Rows, rows_of

_SIZE = 4096
_PAGES = REGION // _SIZE


@pytest.fixture
def block() -> Iterator[MemoryBlock]:
    with GuestMemory() as memory:
        yield memory.add("pc.ram", 3 * REGION + _SIZE)


@pytest.fixture(scope="module")
def _huge_pages() -> None:
    with GuestMemory() as memory:
        try:
            memory.add("pc.ram", REGION).collapse(0)
        except OSError as error:
            pytest.skip(f"no huge pages by MADV_COLLAPSE: {error.strerror}")


def huge(block: MemoryBlock) -> int:
    """Bytes of the block that are mapped in huge pages."""
    with Path("/proc/self/smaps").open() as text:
        lines = iter(text)
        for line in lines:
            if line.startswith(f"{block.address:x}-"):
                field = next(line for line in lines if line.startswith("ShmemPmdMapped:"))
                return int(field.split()[1]) << 10
    raise AssertionError("the block is not mapped")


def records(pages: np.ndarray) -> tuple[Rows, memoryview]:
    """Pages that are filled with the number they have, from 1 on."""
    words = pages.astype(np.uint64) * np.uint64(_SIZE) | np.uint64(PAGE | CONTINUE)
    data = np.repeat((pages % 255 + 1).astype(np.uint8), _SIZE)
    positions = np.arange(len(pages), dtype=np.uint64) * np.uint64(_SIZE)
    return rows_of(words, positions, _SIZE), memoryview(data)


def check(block: MemoryBlock, pages: np.ndarray) -> None:
    found = block.array.reshape(-1, _SIZE)
    assert (found[pages] == (pages % 255 + 1)[:, None]).all()
    assert not np.delete(found, pages, axis=0).any()


@pytest.mark.usefixtures("_huge_pages")
def test_a_region_of_which_much_comes_at_once_is_one_huge_page(block: MemoryBlock) -> None:
    block.array[_PAGES * _SIZE] = 7  # there is memory already, and it stays
    pages = np.arange(_PAGES + 1, _PAGES + 129)
    IncomingBlock(block).place(*records(pages))
    assert block.array[_PAGES * _SIZE] == 7
    block.array[_PAGES * _SIZE] = 0
    check(block, pages)
    assert huge(block) == REGION


def test_pages_that_lie_far_apart_take_no_more_memory_than_they_have(block: MemoryBlock) -> None:
    pages = np.arange(0, 3 * _PAGES, 16)
    IncomingBlock(block).place(*records(pages))
    assert block.populated().sum() == len(pages)
    check(block, pages)


@pytest.mark.usefixtures("_huge_pages")
def test_the_end_of_a_block_that_fills_no_region(block: MemoryBlock) -> None:
    pages = np.arange(2 * _PAGES, 3 * _PAGES + 1)
    IncomingBlock(block).place(*records(pages))
    check(block, pages)
    assert huge(block) == REGION


@pytest.mark.usefixtures("_huge_pages")
def test_room_for_dense_pages_is_one_huge_page_and_for_others_only_theirs(
    block: MemoryBlock,
) -> None:
    incoming = IncomingBlock(block)
    pages = np.array([*range(100), _PAGES, *range(2 * _PAGES - 10, 2 * _PAGES + 63)])
    view = incoming.room([(0, 100), (_PAGES, _PAGES + 1), (2 * _PAGES - 10, 2 * _PAGES + 63)])
    for page in pages.tolist():
        view[page * _SIZE : (page + 1) * _SIZE] = bytes([page % 255 + 1]) * _SIZE
    assert huge(block) == REGION
    assert block.populated().sum() == _PAGES + 1 + 73
    words = pages.astype(np.uint64) * np.uint64(_SIZE) | np.uint64(ZERO | CONTINUE)
    check(block, pages)
    incoming.place(rows_of(words, np.zeros(len(words), np.uint64), 1), memoryview(b"\0"))
    check(block, pages[:0])


def test_zero_records_clear_what_a_huge_page_held(block: MemoryBlock) -> None:
    incoming = IncomingBlock(block)
    pages = np.arange(_PAGES)
    incoming.place(*records(pages))
    words = pages[100:].astype(np.uint64) * np.uint64(_SIZE) | np.uint64(ZERO | CONTINUE)
    incoming.place(rows_of(words, np.zeros(len(words), np.uint64), 1), memoryview(b"\0"))
    check(block, pages[:100])


def test_a_kernel_that_refuses_gives_small_pages(
    block: MemoryBlock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: MemoryBlock, _region: int) -> None:
        raise OSError(22, "stands for Linux before 6.1")

    monkeypatch.setattr(MemoryBlock, "collapse", refuse)
    pages = np.arange(3 * _PAGES + 1)
    IncomingBlock(block).place(*records(pages))
    check(block, pages)
    assert huge(block) == 0
