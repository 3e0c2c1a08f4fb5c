"""What a page of the working set holds, as the guest writes it and as numpy computes it.

A page is 64 lines of 64 bytes, words are little-endian and of 64 bits::

    word 0      MAGIC
         1      number of the page in the working set
         2      sequence: how many times it was written
         3      seed: (number * PAGE_FACTOR + sequence) * SEED_FACTOR
         4      how many of the lines 1 to 63 were written with this sequence number
         5      the vCPU that wrote it
         6      sum of all words but 6 and 7
         7      sum of the sums so far, over the same words in order
         8...   seed, seed + WORD_STEP, seed + 2 * WORD_STEP, ...

Lines behind those that were written with this sequence number still have what they got with
number 1, when the whole page was written.  All arithmetic is modulo 2**64.  The words are written
in order, except for 6 and 7, which come last.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

MAGIC: Final = 0x5952524546564D56
PAGE_FACTOR: Final = 0x9E3779B97F4A7C15
SEED_FACTOR: Final = 0xBF58476D1CE4E5B9
WORD_STEP: Final = 0x94D049BB133111EB

WORDS: Final = 512
HEAD: Final = 8
LINES: Final = 63
LINE_WORDS: Final = 8

NUMBER, SEQUENCE, SEED, CHANGED, WRITER, SUM, SUM_OF_SUMS = range(1, 8)

Words = npt.NDArray[np.uint64]

_BODY_WORDS: Final = WORDS - HEAD
_BODY: Final = np.arange(_BODY_WORDS, dtype=np.uint64) * np.uint64(WORD_STEP)
# How often a word counts in the sum of sums.
_HEAD_WEIGHTS: Final = np.arange(WORDS - 2, _BODY_WORDS, -1, dtype=np.uint64)
_BODY_WEIGHTS: Final = np.arange(_BODY_WORDS, 0, -1, dtype=np.uint64)

ORDER: Final = np.array([*range(SUM), *range(HEAD, WORDS), SUM, SUM_OF_SUMS])
"""The words of a page in the order in which they are written."""


def written(numbers: Words, sequences: Words, changed: int, writers: Words) -> Words:
    """The pages *numbers* as they are once written with *sequences*; 0 is never: all zero.

    *changed* is how many lines are written from the second time on.
    """
    first = sequences == 1
    lines = np.where(first, np.uint64(LINES), np.uint64(changed))
    seeds, old = _seeds(numbers, sequences), _seeds(numbers, np.ones_like(numbers))
    magic = np.full_like(numbers, MAGIC)
    pages = np.empty((len(numbers), WORDS), np.uint64)
    pages[:, :SUM] = np.stack((magic, numbers, sequences, seeds, lines, writers), axis=1)
    fresh = changed * LINE_WORDS
    np.add(seeds[:, None], _BODY[:fresh], out=pages[:, HEAD : HEAD + fresh])
    np.add(old[:, None], _BODY[fresh:], out=pages[:, HEAD + fresh :])
    # The sums of so regular a content need not be counted.
    weight, weight_old = _BODY_WEIGHTS[:fresh].sum(), _BODY_WEIGHTS[fresh:].sum()
    count, count_old = np.uint64(fresh), np.uint64(_BODY_WORDS - fresh)
    pages[:, SUM] = pages[:, :SUM].sum(axis=1) + seeds * count + old * count_old + _BODY.sum()
    pages[:, SUM_OF_SUMS] = pages[:, :SUM] @ _HEAD_WEIGHTS + seeds * weight + old * weight_old
    pages[:, SUM_OF_SUMS] += (_BODY * _BODY_WEIGHTS).sum()
    pages[sequences == 0] = 0
    return pages


def content_sums(pages: Words) -> tuple[Words, Words]:
    """The sum, and the sum of sums, that each of *pages* should hold, from its own content."""
    running = np.cumsum(pages[:, ORDER[:-2]], axis=1, dtype=np.uint64)
    return running[:, -1], running.sum(axis=1, dtype=np.uint64)


def _seeds(numbers: Words, sequences: Words) -> Words:
    return (numbers * np.uint64(PAGE_FACTOR) + sequences) * np.uint64(SEED_FACTOR)
