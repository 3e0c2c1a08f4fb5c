"""RAM blocks for the tests, and what their pages hold."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager

import numpy as np

ONES = b"\1" * 4096
TWOS = b"\2" * 4096
ZEROS = bytes(4096)


def numbers(*pages):
    return np.array(pages, np.uint64)


def memory_of(*pages):
    return np.frombuffer(bytearray(b"".join(pages)), np.uint8)


@contextmanager
def mapped(pages, page_size=4096):
    """A RAM block as it is used: a memfd, mapped shared; and the bytes it takes, as a function."""
    file = os.memfd_create("block")
    os.ftruncate(file, pages * page_size)
    try:
        memory = np.frombuffer(mmap.mmap(file, pages * page_size), np.uint8)
        yield memory, lambda: os.fstat(file).st_blocks * 512
    finally:
        os.close(file)
