"""The memory of a walker seen from outside: every page has to be as the guest left it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from guests.walker import CHECK_FACTOR, MAGIC, PAGE, PASS_FACTOR, SEED

Words = npt.NDArray[np.uint32]

_WORDS = PAGE // 4
_TAIL = _WORDS - 1
_CHUNK = 4096  # pages checked at a time, to bound the memory that takes


def check_ram(
    ram: Any,
    *,
    start: int = 1 << 20,
    pages: int,
    hot: int | None = None,
    fill: int = 0,
    delay: int = 0,  # noqa: ARG001 (so that the parameters of the guest can be handed over as they are)
) -> list[str]:
    """What is wrong in the memory of a walker that was stopped at some instant; nothing if right.

    *ram* is guest-physical memory from address 0, a buffer or a numpy array of bytes; the other
    parameters are those of the walker.  In a pass the guest goes through the hot pages in order, so
    those behind it have the stamp of this pass and the others that of the last one; only the page
    that it is at may be half done.
    """
    memory = np.frombuffer(ram, dtype=np.uint8)
    region = memory[start : start + max(pages, fill) * PAGE].view("<u4").reshape(-1, _WORDS)
    walk = region[:pages]
    if len(region) < max(pages, fill):
        return [
            f"the walk ends at {start + max(pages, fill) * PAGE:#x}, the memory at {len(memory):#x}"
        ]
    problems = [
        f"page {page} at {start + page * PAGE:#x}: {text}"
        for page, text in _stamps(walk, pages if hot is None else hot)
    ]
    problems += [
        f"page {page} at {start + page * PAGE:#x}: not the pseudo-random words it was filled with"
        for page in _fill(region[:fill], pages)
    ]
    return problems


def _stamps(walk: Words, hot: int) -> Iterator[tuple[int, str]]:
    """The pages of *walk* with a wrong stamp, and what is wrong."""
    index = np.arange(len(walk), dtype=np.uint32)
    valid = _valid(walk, index, walk[:, 2])
    stamped = walk[:hot, 2][valid[:hot]]
    newest = int(stamped.max()) if len(stamped) else 1
    if len(stamped) and _half_done(walk[0], 0, newest + 1):
        newest += 1  # it was stopped in the first page of a pass
    reached = hot if newest > 1 else len(walk)
    done = valid[:reached] & (walk[:reached, 2] == newest)
    current = int(np.flatnonzero(done)[-1]) + 1 if done.any() else 0
    expected = np.ones_like(index)
    expected[:reached] = newest - 1
    expected[:current] = newest
    right = _valid(walk, index, expected) | (expected == 0)
    for page in np.flatnonzero(~right):
        if page != current or not (newest == 1 or _half_done(walk[page], int(page), newest)):
            magic, number, found, check = (int(word) for word in walk[page, :4])
            text = (
                f"expected the stamp of pass {expected[page]}, found magic {magic:#x}, "
                f"index {number}, pass {found}, check {check:#x} and {int(walk[page, _TAIL]):#x}"
            )
            yield int(page), text


def _valid(walk: Words, index: Words, passes: Words) -> npt.NDArray[np.bool_]:
    """Whether each page has exactly the stamp of its pass."""
    check = _check(index, passes)
    return np.asarray(
        (walk[:, 0] == MAGIC)
        & (walk[:, 1] == index)
        & (walk[:, 2] == passes)
        & (walk[:, 3] == check)
        & (walk[:, _TAIL] == check)
    )


def _half_done(page: Words, index: int, newest: int) -> bool:
    """Whether *page* has the first words of the stamp of pass *newest* over the one before."""
    numbers = np.array([newest - 1, newest], dtype=np.uint32)
    old, new = (int(check) for check in _check(np.array([index], dtype=np.uint32), numbers))
    found = (int(page[2]), int(page[3]), int(page[_TAIL]))
    head = (int(page[0]), int(page[1]))
    return head == (MAGIC, index) and found in {(newest, old, old), (newest, new, old)}


def _check(index: Words, passes: Words) -> Words:
    return ((passes * np.uint32(PASS_FACTOR)) ^ index) * np.uint32(CHECK_FACTOR)


def _fill(region: Words, walked: int) -> Iterator[int]:
    """The pages of *region* whose filling is wrong; pages of the walk may have a stamp on top."""
    before = np.array([SEED], dtype=np.uint32)
    steps = 5  # from the word before to word 4, the first one that is never stamped
    for first in range(0, len(region), _CHUNK):
        part = region[first : first + _CHUNK]
        follows = part[:, 1:] == _xorshift(part[:, :-1])
        previous = part[:-1, _TAIL - 1]
        right = follows[:, 4 : _TAIL - 1].all(axis=1)
        right &= part[:, 4] == np.concatenate([_steps(before, steps), _steps(previous, 6)])
        right &= follows.all(axis=1) | (np.arange(first, first + len(part)) < walked)
        before, steps = part[-1:, _TAIL - 1], 6
        yield from (int(page) + first for page in np.flatnonzero(~right))


def _steps(words: Words, count: int) -> Words:
    for _ in range(count):
        words = _xorshift(words)
    return words


def _xorshift(words: Words) -> Words:
    words = words ^ (words << np.uint32(13))
    words = words ^ (words >> np.uint32(17))
    return words ^ (words << np.uint32(5))
