"""Which fields of two lists are each other, and what stands between them.

Names are not in the stream, only the order is: fields of the same name in the same order are each
other, and what stands between two such pairs on either side takes each other's place.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
S = TypeVar("S")
W = TypeVar("W")


@dataclass(frozen=True, slots=True)
class Pair(Generic[S, W]):
    """A field that both sides have."""

    sent: S
    wanted: W


@dataclass(frozen=True, slots=True)
class Gap(Generic[S, W]):
    """What each side has between two pairs; ``moved`` is what the sender has elsewhere."""

    sent: list[S]
    wanted: list[W]
    moved: list[W]


def align(
    sent: Sequence[tuple[K, S]], wanted: Sequence[tuple[K, W]], names: Callable[[K], bool]
) -> Iterator[Pair[S, W] | Gap[S, W]]:
    """Pairs and gaps in the order of the stream; no key may occur twice on a side.

    *names* says whether a key is a name: what is not, as that of bytes without meaning, is in gaps.
    """
    places = {key: place for place, (key, _) in enumerate(wanted) if names(key)}
    common = [(at, places[key]) for at, (key, _) in enumerate(sent) if key in places]
    kept = _longest_ascending(common)
    moved = {sent[at][0] for at, _ in set(common) - set(kept)}
    ends = [(-1, -1), *kept, (len(sent), len(wanted))]
    for (before_sent, before_wanted), (at_sent, at_wanted) in pairwise(ends):
        between = wanted[before_wanted + 1 : at_wanted]
        gap = Gap(
            [field for key, field in sent[before_sent + 1 : at_sent] if key not in moved],
            [field for key, field in between if key not in moved],
            [field for key, field in between if key in moved],
        )
        if gap.sent or gap.wanted or gap.moved:
            yield gap
        if at_sent < len(sent):
            yield Pair(sent[at_sent][1], wanted[at_wanted][1])


def _longest_ascending(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of *pairs*, ascending in the first, that ascends in the second too."""
    tails: list[int] = []
    lasts: list[int] = []
    before = [-1] * len(pairs)
    for index, (_, place) in enumerate(pairs):
        length = bisect_left(tails, place)
        before[index] = lasts[length - 1] if length else -1
        tails[length : length + 1] = [place]
        lasts[length : length + 1] = [index]
    kept = []
    index = lasts[-1] if lasts else -1
    while index >= 0:
        kept.append(pairs[index])
        index = before[index]
    return kept[::-1]
