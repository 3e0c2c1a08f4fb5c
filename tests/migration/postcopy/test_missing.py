"""Memory that is missing, and who waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.transports.support import PROMPT, background, wait_until
from vmferry.memory import PAGE_SIZE, GuestMemory, faults
from vmferry.migration.postcopy.missing import MISSING, MappedBlock, MissingMemory
from vmferry.migration.postcopy.shared import Shared
from vmferry.migration.postcopy.waits import Waits

LACK = faults.missing(kernel=False)
pytestmark = pytest.mark.skipif(LACK is not None, reason=str(LACK))

PAGES = 9


class Memory:
    """A block of which all pages are missing, seen by one pager after the other."""

    def __init__(self, memory: GuestMemory) -> None:
        self.block = memory.add("ram", PAGES * PAGE_SIZE)
        self.descriptor = faults.open_faults(kernel=False)
        faults.register(self.descriptor, self.block.address, self.block.size)
        self.block.has_missing = True
        self._file = os.memfd_create("shared")

    def pager(self) -> MissingMemory:
        shared = Shared(self._file, PAGES, [])
        mapped = MappedBlock("ram", self.block.size, 0, self.block.addresses)
        waits = Waits([], shared.times)
        return MissingMemory(self.descriptor, shared.marks, shared.asked, [mapped], waits)

    def close(self) -> None:
        faults.unregister(self.descriptor, self.block.address, self.block.size)
        os.close(self.descriptor)
        os.close(self._file)


@pytest.fixture
def memory() -> Iterator[Memory]:
    with GuestMemory() as guest:
        made = Memory(guest)
        yield made
        made.close()


@pytest.mark.parametrize("same", [True, False], ids=["same-pager", "another-pager"])
def test_what_was_asked_for_is_asked_for_again_even_if_nobody_waits(
    memory: Memory, same: bool
) -> None:
    """As for a vCPU that was interrupted: its page may be under way, and the end overtake it."""
    pager = memory.pager()
    waiting = background(lambda: memory.block.fetch(5 * PAGE_SIZE, 1))
    wanted: list[tuple[str, int]] = []
    wait_until(lambda: bool(wanted.extend(pager.faults()) or wanted))
    assert wanted == [("ram", 5)]
    # The one who waited goes his way, without that the page has come for all that is known.
    faults.place_zeros(memory.descriptor, memory.block.address + 5 * PAGE_SIZE)
    waiting.result(PROMPT)
    after = pager if same else memory.pager()
    assert after.again() == [("ram", 5)]
    assert after.waited == 1


def test_what_has_come_is_not_asked_for_again(memory: Memory) -> None:
    shared = Shared(memory._file, PAGES, [])
    shared.asked[[2, 3]] = True
    shared.marks[2] = MISSING + 1
    pager = memory.pager()
    assert pager.again() == [("ram", 3)]
    assert not shared.asked[2]
