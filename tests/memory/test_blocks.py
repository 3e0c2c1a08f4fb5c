"""RAM blocks: sizes, names, descriptors, views, holes, and their end."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.logs import PAGE, descriptors
from vmferry import UsageError, VmferryError
from vmferry.memory import GuestMemory, holes


@pytest.mark.parametrize("size", [PAGE, 3 * PAGE, (2 << 20) + PAGE, 64 << 30])
def test_blocks_of_any_size_are_zero_and_take_no_memory(size: int) -> None:
    with GuestMemory() as memory:
        block = memory.add("pc.ram", size)
        assert (block.size, block.pages) == (size, size // PAGE)
        assert block.view.nbytes == block.array.nbytes == size
        assert os.fstat(block.fd).st_size == size
        assert os.fstat(block.fd).st_blocks == 0
        assert block.view[size - 1] == 0


def test_all_ways_lead_to_the_same_bytes() -> None:
    with GuestMemory() as memory:
        block = memory.add("pc.ram", 2 * PAGE)
        block.view[5] = 1
        block.array[6] = 2
        os.pwrite(block.fd, b"\3", 7)
        other = mmap.mmap(block.fd, block.size)
        other[8] = 4
        again = memory.map_for_vcpus(block)
        assert again not in {block.address, memory.map_for_vcpus(memory.add("other", PAGE))}
        assert memory.map_for_vcpus(block) == again
        assert block.addresses == (block.address, again)
        assert bytes(block.view[5:9]) == b"\1\2\3\4"
        assert block.address == block.array.ctypes.data
        other.close()


def test_another_process_has_the_memory_by_its_descriptor() -> None:
    with GuestMemory() as memory:
        block = memory.add("pc.ram", PAGE)
        script = f"import mmap; memory = mmap.mmap({block.fd}, {PAGE}); memory[100] = 7"
        subprocess.run([sys.executable, "-c", script], pass_fds=[block.fd], check=True)
        assert block.view[100] == 7


def test_size_is_sealed_and_content_is_not() -> None:
    with GuestMemory() as memory:
        block = memory.add("pc.ram", 2 * PAGE)
        for size in (PAGE, 3 * PAGE):
            with pytest.raises(PermissionError):
                os.truncate(block.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(block.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert not os.get_inheritable(block.fd)


@pytest.mark.parametrize("size", [0, -PAGE, 1, PAGE - 1, PAGE + 1])
def test_other_sizes_are_refused(size: int) -> None:
    with GuestMemory() as memory:
        with pytest.raises(UsageError, match=f'block "ram": expected .* 4096 bytes, found {size}'):
            memory.add("ram", size)
        assert memory.blocks == ()


@pytest.mark.parametrize("name", ["", "x" * 256, "ü" * 128])
def test_names_that_no_stream_has_are_refused(name: str) -> None:
    with GuestMemory() as memory, pytest.raises(UsageError, match="name of 1 to 255 bytes"):
        memory.add(name, PAGE)


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "/rom@etc/acpi/tables", "a\0b", "\n"])
def test_all_other_names_are_taken(name: str) -> None:
    with GuestMemory() as memory:
        assert memory.add(name, PAGE) is memory[name]


def test_blocks_are_found_by_name_and_kept_in_order() -> None:
    with GuestMemory() as memory:
        ram = memory.add("pc.ram", 4 * PAGE)
        rom = memory.add("pc.bios", PAGE, read_only=True)
        nvdimm = memory.add("nvdimm", 2 * PAGE, shared=True)
        assert memory.blocks == (ram, rom, nvdimm)
        assert memory.total == 7 * PAGE
        assert [block.shared for block in memory.blocks] == [False, False, True]
        assert [block.read_only for block in memory.blocks] == [False, True, False]
        rom.view[0] = 1
        with pytest.raises(UsageError, match=r'block "pc\.ram" already'):
            memory.add("pc.ram", PAGE)
        with pytest.raises(UsageError, match='no block "vga"'):
            memory["vga"]


def test_memory_that_the_host_does_not_have_is_an_error_and_leaves_nothing() -> None:
    before = descriptors()
    with GuestMemory() as memory:
        with pytest.raises(VmferryError, match=r'block "ram": the host does not give .* of memory'):
            memory.add("ram", 1 << 60)
        assert memory.blocks == ()
        assert descriptors() == before


def test_close_gives_everything_back() -> None:
    before = descriptors()
    with GuestMemory() as memory:
        for number in range(5):
            memory.map_for_vcpus(memory.add(f"vmferry-test-{number}", PAGE))
        assert "vmferry-test-3" in Path("/proc/self/maps").read_text()
    assert descriptors() == before
    assert "vmferry-test-" not in Path("/proc/self/maps").read_text()
    assert memory.blocks == ()
    memory.close()


def test_image_shows_what_is_written_and_cannot_be_written() -> None:
    with GuestMemory() as memory:
        block = memory.add("ram", 2 * PAGE)
        image = block.image
        block.view[PAGE] = 7
        assert image[PAGE] == 7
        assert image.readonly
        assert block.image is image
        assert len(block.addresses) == 1


def test_views_that_somebody_holds_stay_valid() -> None:
    with GuestMemory() as memory:
        block = memory.add("ram", PAGE)
        part = block.array[:2]
        part[:] = 5
    assert part.tolist() == [5, 5]


def all_swapped_out(_address: int, pages: int) -> np.ndarray:
    return np.zeros(pages, np.bool_)


@given(st.data(), st.booleans())
def test_populated_pages_are_those_that_were_touched(data: st.DataObject, swapped: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if swapped:
            patch.setattr(holes, "_resident", all_swapped_out)
        _touch_and_compare(data)


def _touch_and_compare(data: st.DataObject) -> None:
    pages = data.draw(st.sampled_from([1, 3, 512, 513, 1100]))
    touched = data.draw(st.sets(st.integers(0, pages - 1), max_size=20))
    with GuestMemory() as memory:
        block = memory.add("ram", pages * PAGE)
        for number, page in enumerate(sorted(touched)):
            if number % 2:
                os.pwrite(block.fd, b"\0", page * PAGE)
            else:
                block.view[page * PAGE] = 1
        for _ in range(2):
            assert np.flatnonzero(block.populated()).tolist() == sorted(touched)
        first = min(touched, default=pages) * PAGE
        assert block.next_populated(0) == first
        assert block.next_populated(block.size) == block.size


def test_preallocated_block_has_all_of_its_memory() -> None:
    with GuestMemory() as memory:
        block = memory.add("ram", 3 << 20)
        assert not block.populated().any()
        block.preallocate()
        assert block.populated().all()
        assert not block.array.any()
