"""A guest that never rests while its pages are packed: another process writes."""

from __future__ import annotations

import itertools
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest

from tests.pages.twins import TWINS, plain
from vmferry.pages import ROW, XbzrleCache

NAME = b"\x06pc.ram"
SIZE = 16384
PAGES = 2
# Enough for a copy that is read twice to be noticed, nearly always.
ROUNDS = {"compiled": 20000, "plain": 2000}


# One value after the other over some of a page or all of it; zero is among the values.
WRITER = """
import mmap, sys
import numpy as np
file, pages, size = map(int, sys.argv[1:])
memory = np.frombuffer(mmap.mmap(file, pages * size), np.uint8)
turn = 0
while True:
    for length in (8, 40, 700, size):
        for page in range(pages):
            turn += 1
            start = page * size + turn % (size - length + 1)
            memory[start : start + length] = turn // 3 % 4
    if turn == 4 * pages:
        print("writing", flush=True)
"""


@contextmanager
def written():
    """Memory that another process writes all the time; a call of what is given stops that."""
    file = os.memfd_create("block")
    os.ftruncate(file, PAGES * SIZE)
    memory = np.frombuffer(mmap.mmap(file, PAGES * SIZE), np.uint8)
    command = [sys.executable, "-c", WRITER, str(file), str(PAGES), str(SIZE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[file]) as writer:

        def stop():
            writer.kill()
            writer.wait()

        try:
            assert writer.stdout.readline() == b"writing\n"
            yield memory, stop
        finally:
            stop()
            os.close(file)


def rounds(kernels):
    return ROUNDS["plain" if kernels is plain else "compiled"]


def receive(kernels, out, size, target, known):
    rows = np.zeros(PAGES, ROW)
    stop, count = kernels.scan_records(out, 0, size, SIZE, PAGES * SIZE, NAME, rows)
    assert stop == size
    assert kernels.apply_records(target, rows[:count], 0, out, SIZE, known) == count


@pytest.mark.parametrize("kernels", TWINS)
def test_what_is_kept_of_a_page_is_what_was_sent_of_it(kernels):
    cache = XbzrleCache(PAGES * SIZE, SIZE)
    pages, out = np.arange(PAGES, dtype=np.uint64), bytearray(PAGES * (SIZE + 16))
    target, known = np.zeros(PAGES * SIZE, np.uint8), np.zeros(PAGES, np.uint8)
    seen = np.zeros(3, np.int64)
    with written() as (memory, stop):

        def send(generation):
            done = kernels.pack_pages_xbzrle(
                cache, memory, pages, 0, SIZE, NAME, False, 0, generation, False, out
            )
            assert done.following == PAGES
            receive(kernels, out, done.size, target, known)
            held = cache.content.reshape(PAGES, SIZE)[cache.tags == pages]
            assert np.array_equal(held, target.reshape(PAGES, SIZE)[cache.tags == pages])
            return done.zeros, done.pages - done.overflow, done.overflow

        for generation in itertools.count():
            seen += send(generation)
            if generation > rounds(kernels) and seen.all():
                break
        stop()
        send(generation)
        assert np.array_equal(target, memory)


@pytest.mark.parametrize("kernels", TWINS)
def test_records_of_a_page_that_is_being_written_are_whole(kernels):
    pages, out = np.arange(PAGES, dtype=np.uint64), bytearray(PAGES * (SIZE + 16))
    target, known = np.zeros(PAGES * SIZE, np.uint8), np.zeros(PAGES, np.uint8)
    mask, copy = np.zeros(PAGES, np.uint8), np.zeros(PAGES * SIZE, np.uint8)
    with written() as (memory, stop):

        def send():
            done = kernels.pack_pages(memory, pages, 0, SIZE, NAME, False, out)
            assert done[0] == PAGES
            receive(kernels, out, done[1], target, known)
            kernels.zero_pages(memory, pages, SIZE, mask)
            kernels.gather_pages(memory, pages, SIZE, copy)

        for _ in range(rounds(kernels)):
            send()
        stop()
        send()
        assert np.array_equal(target, memory)
        assert np.array_equal(copy, memory)
        assert mask.tolist() == [not page.any() for page in memory.reshape(PAGES, SIZE)]
