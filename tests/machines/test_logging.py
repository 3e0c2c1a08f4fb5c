"""A copy that follows the dirty log of a running machine is in the end the machine's memory."""

from __future__ import annotations

import numpy as np
import pytest

from vmferry.errors import UsageError
from vmferry.memory import DirtyLog, MemoryBlock, open_dirty_log
from vmferry.memory.userfaultfd import UserfaultfdLog

from .hosted import KINDS, KVM, MIB, PAGE, Hosted, Start

GUEST = {"cpus": 2, "working_set": 4 * MIB, "hot": 0.7, "changed": 0.3}


class Follower:
    """A copy of a block, brought up to date by a log."""

    def __init__(self, log: DirtyLog, block: MemoryBlock) -> None:
        self.log, self.block = log, block
        log.start()
        self.pages = np.array(self._content())

    def follow(self) -> int:
        bits = np.zeros(-(-self.block.pages // 64), np.uint64)
        count = self.log.collect(self.block, bits)
        dirty = np.unpackbits(bits.view(np.uint8), bitorder="little").view(np.bool_)
        dirty = dirty[: self.block.pages]
        assert dirty.sum() == count
        self.pages[dirty] = self._content()[dirty]
        return count

    def _content(self) -> np.ndarray:
        return np.frombuffer(self.log.content(self.block), np.uint8).reshape(-1, PAGE)


def open_log(guest: Hosted, kind: str) -> DirtyLog:
    if kind == "auto":
        return guest.machine.dirty_log()
    if kind == "userfaultfd" and (missing := UserfaultfdLog.missing()):
        pytest.skip(missing)
    return open_dirty_log(guest.machine.memory, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("log", ["auto", "userfaultfd", "shadow"])
def test_no_write_is_lost(hosted: Start, kind: str, log: str) -> None:
    guest = hosted(kind, **GUEST).run_until_filled()
    guest.machine.pause()
    follower = Follower(open_log(guest, log), guest.machine.memory["ram"])
    try:
        for number in range(20):
            guest.machine.resume()
            guest.console.wait_beat()
            follower.follow()
            guest.machine.pause()
            guest.ram[-1] = number + 1  # by the host, where the guest has nothing
            assert follower.follow() > 0
            assert np.array_equal(follower.pages, guest.ram.reshape(-1, PAGE))
            assert follower.follow() == 0
    finally:
        follower.log.stop()
    guest.ram[-1] = 0
    assert guest.findings() == []


@pytest.mark.parametrize(
    ("kind", "log"), [("unicorn", "userfaultfd"), pytest.param("kvm", "kvm", marks=KVM.marks)]
)
def test_the_log_is_the_one_of_the_host(hosted: Start, kind: str, log: str) -> None:
    if missing := UserfaultfdLog.missing():
        pytest.skip(missing)
    assert hosted(kind).machine.dirty_log().name == log


def test_a_log_that_the_host_has_not_is_refused(hosted: Start) -> None:
    with pytest.raises(UsageError, match="kvm"):
        open_dirty_log(hosted("unicorn").machine.memory, "kvm")
