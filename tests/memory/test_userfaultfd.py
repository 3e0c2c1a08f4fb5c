"""What is particular to write-protected pages: page tables, huge pages, holes, privileges."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.memory.logs import PAGE, collect, guest, need_userfaultfd
from vmferry import UsageError
from vmferry.memory import GuestMemory, MemoryBlock, open_dirty_log, userfaultfd

MADV_DONTNEED = 4
MADV_COLLAPSE = 25

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def advise(block: MemoryBlock, first: int, pages: int, advice: int) -> int:
    """The error number."""
    failed = _libc.madvise(block.address + first * PAGE, pages * PAGE, advice)
    return ctypes.get_errno() if failed else 0


def page_tables() -> int:
    """KiB of page tables of this process."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmPTE:") + 1])


@pytest.mark.parametrize("touched", [0, 1, 1024])
def test_written_pages_that_lost_their_place_in_the_page_table_are_reported(touched: int) -> None:
    """As when they are swapped out."""
    with guest("userfaultfd") as made:
        block = made.add("ram", 1024)
        block.array[: touched * PAGE] = 1
        made.log.start()
        for pages in ({3, 4, 700}, {4, 1023}):
            for page in pages:
                block.array[page * PAGE] += 1
            assert advise(block, 0, block.pages, MADV_DONTNEED) == 0
            assert collect(made.log, block) == pages
            assert collect(made.log, block) == set()


def test_protection_outlives_the_place_in_the_page_table() -> None:
    with guest("userfaultfd") as made:
        block = made.add("ram", 600)
        block.array[:] = 1
        made.log.start()
        assert advise(block, 0, block.pages, MADV_DONTNEED) == 0
        assert int(block.array[7 * PAGE]) == 1
        assert collect(made.log, block) == set()
        block.array[7 * PAGE] = 2
        assert collect(made.log, block) == {7}


def test_pages_that_another_mapping_filled_are_told_from_those_that_were_written() -> None:
    with guest("userfaultfd") as made:
        block = made.add("ram", 600)
        os.pwrite(block.fd, b"x" * PAGE, 0)
        made.log.start()
        assert bytes(block.view[:2]) == b"xx"
        os.pwrite(block.fd, b"y", 0)
        assert collect(made.log, block) == set()
        block.view[1] = 0
        assert collect(made.log, block) == {0}


def test_huge_pages_are_logged_by_small_ones() -> None:
    with guest("userfaultfd") as made:
        block = made.add("ram", 2048)
        block.array[:] = 1
        if error := advise(block, 0, block.pages, MADV_COLLAPSE):
            pytest.skip(f"no huge pages by MADV_COLLAPSE: {os.strerror(error)}")
        made.log.start()
        for page in (0, 511, 512, 1300, 2047):
            block.array[page * PAGE] = 2
            assert collect(made.log, block) == {page}
            assert collect(made.log, block) == set()
        made.log.stop()
        made.log.start()
        block.array[9 * PAGE] = 3
        assert collect(made.log, block) == {9}


_HUGE_PROGRAM = """
import ctypes, os, subprocess, sys, types
import numpy as np
import vmferry.memory.blocks as blocks
from vmferry.memory import GuestMemory, open_dirty_log

class HugeFiles:
    # As memfd on a host whose shared memory always has huge pages.
    def __getattr__(self, name):
        return getattr(os, name)
    def memfd_create(self, name, flags):
        return os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

blocks.os = HugeFiles()
blocks.fcntl = types.SimpleNamespace(fcntl=lambda *_: 0, F_ADD_SEALS=0)
assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
directory = os.path.dirname(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "none", directory], check=True)

def huge():
    with open("/proc/self/smaps") as maps:
        return sum(int(line.split()[1]) for line in maps if line.startswith("ShmemPmdMapped:"))

def collect():
    words = np.zeros(block.pages // 64, np.uint64)
    log.collect(block, words)
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()

with GuestMemory() as memory:
    block = memory.add("ram", 16 << 20)
    block.array[:4 << 20] = 1
    print(huge() > 0)
    log = open_dirty_log(memory, "userfaultfd")
    log.start()
    for page in (3, 700, 2048, 2049):
        block.array[page * 4096] = 2
        print(collect())
    log.stop()
    block.array[12 << 20] = 1
    print(huge() > 0)
"""


def test_no_huge_pages_come_while_it_runs(tmp_path: Path) -> None:
    need_userfaultfd()
    if os.getuid():
        pytest.skip("only root can mount a file system whose files always have huge pages")
    output = subprocess.run(
        [sys.executable, "-c", _HUGE_PROGRAM, str(tmp_path / "memory")],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    ).stdout
    assert output.split("\n")[:-1] == ["True", "[3]", "[700]", "[2048]", "[2049]", "True"]


def test_memory_that_was_never_touched_takes_no_page_tables() -> None:
    with guest("userfaultfd") as made:
        block = made.add("ram", (64 << 30) // PAGE)
        before = page_tables()
        made.log.start()
        block.array[63 << 30] = 1
        assert collect(made.log, block) == {(63 << 30) // PAGE}
        assert collect(made.log, block) == set()
        assert page_tables() - before < 1024


def test_two_logs_of_the_same_memory_are_refused() -> None:
    with guest("userfaultfd") as made:
        made.add("ram", 1)
        made.log.start()
        another = open_dirty_log(made.memory, "userfaultfd")
        with pytest.raises(UsageError, match="has a dirty log by userfaultfd already"):
            another.start()
        another.stop()
        made.memory["ram"].view[0] = 1
        assert collect(made.log, made.memory["ram"]) == {0}


@pytest.fixture
def _old_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    need_userfaultfd()
    monkeypatch.setattr(userfaultfd, "_FEATURES", 1 << 60)
    return iter(())


@pytest.mark.usefixtures("_old_kernel")
def test_where_the_kernel_is_too_old_the_shadow_is_taken_and_a_wish_is_refused() -> None:
    with GuestMemory() as memory:
        assert open_dirty_log(memory).name == "shadow"
        for kind in ("userfaultfd", "kvm"):
            expected = f"{kind} is not to be had here: .*WP_ASYNC: Invalid argument; Linux 6.7"
            with pytest.raises(UsageError, match=expected):
                open_dirty_log(memory, kind)


_PROGRAM = """
import ctypes, json, os, sys
import numpy as np
from vmferry import UsageError
from vmferry.memory import GuestMemory, open_dirty_log

def outcome(kind):
    with GuestMemory() as memory:
        block = memory.add("ram", 600 * 4096)
        block.array[:] = 1
        try:
            log = open_dirty_log(memory, kind)
        except UsageError as error:
            return str(error)
        log.start()
        block.array[7 * 4096] = 2
        words = np.zeros(10, np.uint64)
        count = log.collect(block, words)
        log.stop()
        return [log.name, count, int(words[0])]

kinds = ["auto", "userfaultfd", "shadow"]
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
found = {"changed": {kind: outcome(kind) for kind in kinds}}
# As in a process that has executed a program since: PR_SET_DUMPABLE.
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
found["executed"] = {kind: outcome(kind) for kind in kinds}
with open("/proc/self/status") as status:
    found["capabilities"] = [line.split()[1] for line in status if line.startswith("CapEff")]
print(json.dumps(found))
"""


def test_without_privileges() -> None:
    """All that is there works for nobody, too."""
    need_userfaultfd()
    output = subprocess.run(
        [sys.executable, "-c", _PROGRAM], check=True, stdout=subprocess.PIPE, timeout=60
    ).stdout
    found = json.loads(output)
    assert set(found["capabilities"]) == {"0" * 16}
    shadow, faults = ["shadow", 1, 1 << 7], ["userfaultfd", 1, 1 << 7]
    assert found["executed"] == {"auto": faults, "userfaultfd": faults, "shadow": shadow}
    if os.getuid() == 0:
        assert "/proc/self/pagemap may not be opened" in found["changed"]["userfaultfd"]
        assert "changed its user id" in found["changed"]["userfaultfd"]
        assert found["changed"]["auto"] == found["changed"]["shadow"] == shadow
