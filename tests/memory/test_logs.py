"""What holds for dirty logs of every kind."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.memory.logs import (
    PAGE,
    Copy,
    Guest,
    Restless,
    collect,
    descriptors,
    every_kind,
    guest,
    writers,
)
from vmferry import UsageError
from vmferry.memory import GuestMemory, holes, open_dirty_log, pagemap, userfaultfd

SIZES = [1, 2, 63, 64, 65, 511, 512, 513, 1100]


@every_kind
@settings(max_examples=40)
@given(data=st.data())
def test_random_writes_give_exactly_those_pages(kind: str, data: st.DataObject) -> None:
    with guest(kind) as made:
        _write_and_compare(made, data)


@settings(max_examples=40)
@given(data=st.data())
def test_so_they_do_in_pieces(data: st.DataObject) -> None:
    """Few runs fit into what one scan reports, and little memory into what is scanned at a time."""
    with pytest.MonkeyPatch.context() as patch, guest("userfaultfd") as made:
        patch.setattr(pagemap, "_RUNS", data.draw(st.integers(1, 5)))
        patch.setattr(userfaultfd, "_WINDOW", holes.REGION)
        _write_and_compare(made, data)


def _write_and_compare(made: Guest, data: st.DataObject) -> None:
    made.add("first", data.draw(st.sampled_from(SIZES)))
    made.add("second", data.draw(st.sampled_from(SIZES)))
    number = 1
    for step in range(data.draw(st.integers(1, 5))):
        if step == 1:
            made.log.start()
        if step == 3:
            made.add("third", data.draw(st.sampled_from(SIZES)))
        for block in made.memory.blocks:
            pages = data.draw(st.sets(st.integers(0, block.pages - 1)))
            for page in pages:
                block.array[page * PAGE + number % PAGE] = number % 255 + 1
                number += 1
            if step:
                assert collect(made.log, block) == pages
                assert collect(made.log, block) == set()


@every_kind
def test_writers_that_never_rest_lose_nothing(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 1500)
        with Restless(*writers(block, seed=1)) as restless:
            made.log.start()
            copy = Copy(made.log, block)
            while min(restless.turns) < 300 or sum(restless.turns) < 3000:
                copy.send()
        copy.check()
        assert collect(made.log, block) == set()


@every_kind
def test_blocks_that_are_added_while_it_runs_are_logged_from_their_first_page(kind: str) -> None:
    with guest(kind) as made:
        made.log.start()
        for number in range(5):
            block = made.add(f"block {number}", 300 + number)
            block.array[:: 7 * PAGE] = 1
            assert collect(made.log, block) == set(range(0, block.pages, 7))
            with Restless(*writers(block, seed=number)) as restless:
                copy = Copy(made.log, block)
                while min(restless.turns) < 20:
                    copy.send()
            copy.check()


@every_kind
def test_memory_that_was_never_touched_stays_so(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 4000)
        block.array[100 * PAGE] = block.array[2000 * PAGE] = 1
        made.log.start()
        block.array[2001 * PAGE] = block.array[3999 * PAGE] = 1
        for expected in ({2001, 3999}, set()):
            assert collect(made.log, block) == expected
            assert np.flatnonzero(block.populated()).tolist() == [100, 2000, 2001, 3999]
            assert os.fstat(block.fd).st_blocks * 512 == 4 * PAGE


@every_kind
def test_pages_that_were_read_are_not_reported(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 1024)
        block.array[0] = block.array[-1] = 1
        made.log.start()
        assert int(block.array.sum()) == 2
        assert collect(made.log, block) == set()
        block.array[9 * PAGE] = 1
        assert collect(made.log, block) == {9}


@every_kind
def test_what_the_kernel_writes_for_this_process_is_logged(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 600)
        block.array[:] = 1
        made.log.start()
        read, write = os.pipe()
        os.write(write, b"x" * 100)
        assert os.readv(read, [block.view[5 * PAGE - 50 : 5 * PAGE + 50]]) == 100
        os.close(read)
        os.close(write)
        assert collect(made.log, block) == {4, 5}


@every_kind
def test_blocks_that_are_shared_or_read_only_are_logged(kind: str) -> None:
    with guest(kind) as made:
        shared = made.memory.add("nvdimm", 8 * PAGE, shared=True)
        rom = made.memory.add("pc.bios", 8 * PAGE, read_only=True)
        made.log.start()
        copies = [Copy(made.log, block) for block in (shared, rom)]
        for block, copy in zip((shared, rom), copies, strict=True):
            block.array[3 * PAGE] = 1
            copy.check()


@every_kind
def test_a_page_that_changes_back_after_it_was_sent_is_sent_again(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 3)
        made.log.start()
        copy = Copy(made.log, block)
        for between in (2, 1, 2, 1):
            block.array[PAGE] = 1
            words = np.zeros(1, np.uint64)
            made.log.collect(block, words)
            block.array[PAGE] = between
            copy._sent[1] = copy._content[1]
            block.array[PAGE] = 1
            copy.check()


@every_kind
def test_bits_that_are_set_stay_set(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 70)
        made.log.start()
        words = np.array([1 << 9, 0, 1 << 63], np.uint64)
        block.array[65 * PAGE] = 1
        assert made.log.collect(block, words) == 1
        assert words.tolist() == [1 << 9, 2, 1 << 63]


@every_kind
def test_bitmaps_that_do_not_fit_are_refused_and_nothing_is_lost(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 65)
        made.log.start()
        block.array[64 * PAGE] = 1
        for words in (np.zeros(1, np.uint64), np.zeros(2, np.int64), np.zeros(2, ">u8")):
            with pytest.raises(UsageError, match='block "ram": expected a bitmap of 2 little-end'):
                made.log.collect(block, words)
        assert collect(made.log, block) == {64}


@every_kind
def test_a_log_starts_again_from_nothing_and_stops_more_than_once(kind: str) -> None:
    with guest(kind) as made:
        block = made.add("ram", 600)
        before = descriptors()
        made.log.stop()
        for _ in range(3):
            made.log.start()
            block.array[7 * PAGE] += 1
            assert collect(made.log, block) == {7}
            block.array[8 * PAGE] += 1
        made.log.stop()
        made.log.stop()
        assert descriptors() == before
        with pytest.raises(UsageError, match='block "ram" is in no dirty log that was started'):
            collect(made.log, block)
        made.add("another", 1)
        another = open_dirty_log(made.memory, kind, kvm=made.host)
        another.start()
        assert collect(another, block) == set()
        another.stop()


@every_kind
def test_a_log_may_outlive_its_memory(kind: str) -> None:
    with guest(kind) as made:
        made.add("ram", 600).array[:] = 1
        made.log.start()
        made.memory.close()
        made.log.stop()


@every_kind
def test_a_log_is_called_what_it_is(kind: str) -> None:
    with guest(kind) as made:
        assert made.log.name == kind


def test_unknown_kinds_are_refused() -> None:
    with GuestMemory() as memory:
        with pytest.raises(UsageError, match="expected a dirty log auto, userfaultfd, kvm, shadow"):
            open_dirty_log(memory, "soft-dirty")
        with pytest.raises(UsageError, match="for a machine on KVM"):
            open_dirty_log(memory, "kvm")
