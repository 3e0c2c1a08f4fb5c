"""Pages that are missing are waited for, and come once and whole."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest

from tests.transports.support import PROMPT, background
from vmferry.memory import PAGE_SIZE, GuestMemory, MemoryBlock, faults

MISSING = faults.missing(kernel=True)
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

CONTENT = np.arange(3 * PAGE_SIZE, dtype=np.uint64).astype(np.uint8)


class Missing:
    """A block that has a second mapping, and faults where it has no memory."""

    def __init__(self, memory: GuestMemory) -> None:
        self.block: MemoryBlock = memory.add("ram", 64 * PAGE_SIZE)
        self.other = memory.map_for_vcpus(self.block)
        self.descriptor = faults.open_faults(kernel=True)
        for address in self.block.addresses:
            faults.register(self.descriptor, address, self.block.size)
        self.block.has_missing = True

    def fault(self) -> int:
        """The address of the next fault."""
        assert select.select([self.descriptor], [], [], PROMPT)[0]
        ((address, _),) = faults.read_faults(self.descriptor)
        return address

    def place(self, page: int, pages: int = 1) -> None:
        to = self.block.address + page * PAGE_SIZE
        faults.place(self.descriptor, to, CONTENT.ctypes.data, pages * PAGE_SIZE)

    def toucher(self, page: int) -> Future[None]:
        """Waits for a page in a thread, without the interpreter lock."""
        return background(lambda: self.block.fetch(page * PAGE_SIZE + 7, 1))


@pytest.fixture
def there() -> Iterator[Missing]:
    with GuestMemory() as memory:
        made = Missing(memory)
        yield made
        os.close(made.descriptor)


def test_page_is_waited_for_until_it_comes(there: Missing) -> None:
    waiting = there.toucher(5)
    assert there.fault() == there.block.address + 5 * PAGE_SIZE
    assert list(faults.read_faults(there.descriptor)) == []
    assert not waiting.done()
    there.place(5)
    waiting.result(PROMPT)
    assert (there.block.array[5 * PAGE_SIZE : 6 * PAGE_SIZE] == CONTENT[:PAGE_SIZE]).all()


def test_who_is_woken_too_early_asks_again(there: Missing) -> None:
    waiting = there.toucher(5)
    address = there.fault()
    faults.wake(there.descriptor, address)
    assert there.fault() == address
    assert faults.place_zeros(there.descriptor, address)
    waiting.result(PROMPT)


def test_what_is_there_already_stays(there: Missing) -> None:
    there.place(10)
    there.block.array[10 * PAGE_SIZE] = 77
    there.place(9, pages=3)
    assert int(there.block.array[10 * PAGE_SIZE]) == 77
    assert not faults.place_zeros(there.descriptor, there.block.address + 10 * PAGE_SIZE)
    for page, row in ((9, 0), (11, 2)):
        start = page * PAGE_SIZE
        wanted = CONTENT[row * PAGE_SIZE : (row + 1) * PAGE_SIZE]
        assert (there.block.array[start : start + PAGE_SIZE] == wanted).all()


def test_other_mappings_have_the_page_as_well(there: Missing) -> None:
    other = there.block._mappings[there.other]
    waiting = background(lambda: other.advise(22, 3 * PAGE_SIZE, PAGE_SIZE))
    assert there.fault() == there.other + 3 * PAGE_SIZE
    there.place(3)
    assert not waiting.done()
    faults.wake(there.descriptor, there.other + 3 * PAGE_SIZE)
    waiting.result(PROMPT)
    assert int(other.array[3 * PAGE_SIZE + 1]) == 1


def test_nobody_waits_where_nothing_is_missing_any_more(there: Missing) -> None:
    waiting = there.toucher(5)
    there.fault()
    for address in there.block.addresses:
        faults.unregister(there.descriptor, address, there.block.size)
    waiting.result(PROMPT)
    assert not there.block.array[5 * PAGE_SIZE : 6 * PAGE_SIZE].any()


def test_discarded_memory_is_missing(there: Missing) -> None:
    there.place(20)
    there.block.discard(20 * PAGE_SIZE, PAGE_SIZE)
    waiting = there.toucher(20)
    assert there.fault() == there.block.address + 20 * PAGE_SIZE
    there.place(20)
    waiting.result(PROMPT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_without_privilege_it_is_for_faults_of_programs_alone() -> None:
    code = (
        "import os; from vmferry.memory.faults import missing; os.setuid(65534);"
        " print(missing(kernel={}))"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code.format(kernel)], capture_output=True, text=True, check=False
        )
        for kernel in (False, True)
    ]
    assert [one.stderr for one in told] == ["", ""]
    assert told[0].stdout == "None\n"
    assert "/dev/userfaultfd" in told[1].stdout
    assert "CAP_SYS_PTRACE" in told[1].stdout
