"""What the guest finds by itself, what an observer finds, and that both know the same pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.machines.hosted import KINDS, Hosted, Start, move
from vmferry.errors import MachineError
from vmferry.machines.guest.layout import OFFSETS
from vmferry.machines.guest.pages import (
    HEAD,
    LINE_WORDS,
    LINES,
    MAGIC,
    ORDER,
    PAGE_FACTOR,
    SEED_FACTOR,
    SUM,
    SUM_OF_SUMS,
    WORD_STEP,
    WORDS,
    content_sums,
    written,
)

PAGES = 256
VCPUS = pytest.mark.parametrize("vcpu", [0, 1])
HALVES = pytest.mark.parametrize("first", [0, PAGES // 2], ids=["hot", "cold"])
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)

Damage = Callable[[Hosted, int], None]


def flip(guest: Hosted, page: int) -> None:
    guest.page(page)[2000] ^= 0x10


def lose(guest: Hosted, page: int) -> None:
    guest.page(page)[:] = 0


def misplace(guest: Hosted, page: int) -> None:
    guest.page(page)[:] = guest.page(page ^ 1)


def older(guest: Hosted, page: int) -> None:
    """What the page was before, right in itself, or zero if it was written once."""
    words = guest.page(page).view("<u8")
    sequence = words[2:3] - np.uint64(1)
    changed = guest.counters()[OFFSETS["changed"] // 8]
    words[:] = written(words[1:2], sequence, int(changed), words[5:6])[0]


def half(guest: Hosted, page: int) -> None:
    """The first bytes are older."""
    now = guest.page(page).copy()
    older(guest, page)
    guest.page(page)[512:] = now[512:]


@ALL_KINDS
@VCPUS
@HALVES
@pytest.mark.parametrize(
    ("damage", "told", "seen"),
    [
        (flip, "is torn", "is torn, from byte 2000 on"),
        (lose, "is lost", "is lost: expected sequence"),
        (misplace, "is misplaced", "is lost: expected page"),
        (older, "is stale|is lost", "is (stale|lost): expected sequence"),
        (half, "is stale|is lost", "is (torn, from byte|lost)"),
    ],
)
def test_page_that_is_wrong_is_found_by_both(
    hosted: Start, kind: str, vcpu: int, first: int, damage: Damage, told: str, seen: str
) -> None:
    guest = hosted(kind, cpus=2, hot=0.5, changed=0.3).run_until_filled()
    guest.run_on()
    guest.machine.pause()
    share = guest.machine.layout.share(vcpu)
    start, count = (
        (share.cold_first, share.cold_count) if first else (share.hot_first, share.hot_count)
    )
    steps = int(guest.counters(vcpu)[OFFSETS["cold_steps" if first else "hot_steps"] // 8])
    page = start + (steps + count // 2) % count  # far from where the vCPU is
    damage(guest, page)
    [finding] = guest.findings()
    assert re.match(f"page {page} {seen}", finding)
    guest.machine.resume()
    assert guest.machine.wait(60) == 1
    [report] = guest.console.reports
    assert (report.vcpu, report.page) == (vcpu, page)
    assert re.search(f"page {page} {told}", str(report))
    with pytest.raises(MachineError, match=f"the guest found an error: vCPU {vcpu}: page {page}"):
        guest.console.check()
    assert any(f"the guest found: vCPU {vcpu}" in text for text in guest.findings())


@ALL_KINDS
@VCPUS
@pytest.mark.parametrize("name", ["hot_steps", "cold_steps"])
def test_counter_of_another_instant_is_found(
    hosted: Start, kind: str, vcpu: int, name: str
) -> None:
    guest = hosted(kind, cpus=2, hot=0.5).run_until_filled()
    while not guest.console.reports:  # again where the guest was just about to write it
        guest.machine.pause()
        guest.counters(vcpu)[OFFSETS[name] // 8] -= np.uint64(1)
        guest.machine.resume()
        with suppress(MachineError):
            guest.run_on()
    assert guest.machine.wait(60) == 1
    assert str(guest.console.reports[0]).startswith(f"vCPU {vcpu}: there are counters that disa")


@ALL_KINDS
@pytest.mark.parametrize("register", [6, 7])
def test_sse_register_of_another_instant_is_found(hosted: Start, kind: str, register: int) -> None:
    guest = hosted(kind, hot=0.5).run_until_filled()
    guest.machine.pause()
    cpu = guest.cpu()
    xmm = bytearray(cpu.fpu.xmm)
    xmm[16 * register] ^= 1
    cpu.fpu.xmm = bytes(xmm)
    cpu.post_load(1)
    guest.machine.resume()
    assert guest.machine.wait(60) == 1
    assert "vCPU 0: there are registers that disagree" in str(guest.console.reports[0])


@ALL_KINDS
def test_pages_of_another_instant_than_the_processors_are_found(
    hosted: Start, kind: str, tmp_path: Path
) -> None:
    guest = hosted(kind, cpus=2).run_until_filled()
    guest.machine.pause()
    before = guest.ram.copy()
    guest.machine.resume()
    guest.run_on()
    other = hosted(kind, cpus=2)
    move(guest, other, tmp_path)
    base = other.machine.layout.base
    other.ram[base:] = before[base:]
    other.machine.resume()
    assert other.machine.wait(60) == 1
    assert other.console.reports


@ALL_KINDS
def test_observer_names_what_is_outside_the_working_set(hosted: Start, kind: str) -> None:
    guest = hosted(kind).run_until_filled()
    guest.machine.pause()
    layout = guest.machine.layout
    for offset, text in (
        (layout.end, "expected zeros"),
        (layout.ram - 1, "expected zeros"),
        (0, "expected zeros"),
        (0x2000, "1 bytes differ"),
        (layout.tables + 8, "1 bytes differ"),
        (layout.block(0) + 8, "1 bytes differ"),
    ):
        guest.ram[offset] ^= 0x40
        [finding] = guest.findings()
        assert text in finding
        guest.ram[offset] ^= 0x40
    assert guest.findings() == []


@ALL_KINDS
def test_memory_before_the_first_instruction_is_named(hosted: Start, kind: str) -> None:
    findings = hosted(kind).findings()
    assert "differ from what the board wrote" in findings[0]


def test_page_is_as_the_text_says() -> None:
    number, sequence, changed, vcpu = 5, 3, 2, 1
    mask = (1 << 64) - 1
    page = [MAGIC, number, sequence, 0, changed, vcpu, 0, 0]
    for line in range(LINES):
        counted = sequence if line < changed else 1
        seed = (number * PAGE_FACTOR + counted) * SEED_FACTOR
        first = line * LINE_WORDS
        page += [(seed + (first + word) * WORD_STEP) & mask for word in range(LINE_WORDS)]
    page[3] = page[HEAD]
    total = totals = 0
    for word in ORDER[:-2]:
        total = total + page[word] & mask
        totals = totals + total & mask
    page[6:8] = total, totals
    as_array = [np.array([value], np.uint64) for value in (number, sequence, vcpu)]
    assert written(as_array[0], as_array[1], changed, as_array[2])[0].tolist() == page


@given(
    numbers=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=4),
    sequence=st.integers(1, 1 << 50),
    changed=st.integers(1, LINES),
)
def test_sums_without_counting_are_those_counted(
    numbers: list[int], sequence: int, changed: int
) -> None:
    pages = np.array(numbers, np.uint64)
    made = written(pages, np.full_like(pages, sequence), changed, pages)
    total, totals = content_sums(made)
    assert np.array_equal(total, made[:, SUM])
    assert np.array_equal(totals, made[:, SUM_OF_SUMS])


def test_never_written_pages_are_zero() -> None:
    pages = np.arange(3, dtype=np.uint64)
    assert not written(pages, np.zeros_like(pages), 10, pages).any()
    assert sorted(ORDER.tolist()) == list(range(WORDS))
