"""Page sums: XXH64, and 0 for a zero page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from .types import U64, Bytes

_P1: Final = np.uint64(0x9E3779B185EBCA87)
_P2: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_P3: Final = np.uint64(0x165667B19E3779F9)
_P4: Final = np.uint64(0x85EBCA77C2B2AE63)


def page_sums(data: Bytes, page_size: int, sums: U64) -> None:
    """The sum of each whole page of *data* into *sums*: XXH64 with seed 0, and 0 for a zero page.

    A page with other content whose XXH64 is 0 gets 1.
    """
    if page_size < 32 or page_size % 32:
        raise ValueError("page_sums: page size not a multiple of 32")
    count = len(data) // page_size
    if len(sums) < count:
        raise ValueError("page_sums: sums too short")
    pages = np.frombuffer(data, "<u8", count * page_size // 8).reshape(count, page_size // 8)
    value = _xxh64(pages, page_size)
    value[value == 0] = 1
    value[~pages.any(axis=1)] = 0
    sums[:count] = value


def _xxh64(pages: U64, page_size: int) -> U64:
    lanes = [np.full(len(pages), seed, np.uint64) for seed in _seeds()]
    for at in range(0, page_size // 8, 4):
        for lane in range(4):
            lanes[lane] = _rotl(lanes[lane] + pages[:, at + lane] * _P2, 31) * _P1
    value: U64 = sum(
        (_rotl(v, n) for v, n in zip(lanes, (1, 7, 12, 18), strict=True)),
        np.zeros(len(pages), np.uint64),
    )
    for v in lanes:
        value = (value ^ (_rotl(v * _P2, 31) * _P1)) * _P1 + _P4
    value = value + np.uint64(page_size)
    value = (value ^ (value >> np.uint64(33))) * _P2
    value = (value ^ (value >> np.uint64(29))) * _P3
    return value ^ (value >> np.uint64(32))


def _seeds() -> Iterator[np.uint64]:
    mask = (1 << 64) - 1
    for seed in (int(_P1) + int(_P2), int(_P2), 0, -int(_P1)):
        yield np.uint64(seed & mask)


def _rotl(value: U64, count: int) -> U64:
    return (value << np.uint64(count)) | (value >> np.uint64(64 - count))
