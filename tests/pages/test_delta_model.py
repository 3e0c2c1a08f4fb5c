"""Whatever a guest writes: what the cache holds is what the destination holds.

Two RAM blocks share a cache of a few slots; the destination does what the records say.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.pages.twins import compiled, plain
from vmferry.pages import ROW, XbzrleCache

SIZE = 1024
PAGES = 6
BLOCKS = 2
NAME = b"\x06pc.ram"
blocks = st.integers(0, BLOCKS - 1)
pages = st.integers(0, PAGES - 1)


class Migration(RuleBasedStateMachine):
    kernels = plain

    @initialize(slots=st.sampled_from((1, 2, 4, 16)))
    def start(self, slots):
        self.cache = XbzrleCache(slots * SIZE, SIZE)
        self.source = [np.zeros(PAGES * SIZE, np.uint8) for _ in range(BLOCKS)]
        self.target = [np.zeros(PAGES * SIZE, np.uint8) for _ in range(BLOCKS)]
        self.known = [np.zeros(PAGES, np.uint8) for _ in range(BLOCKS)]
        self.dirty = [set() for _ in range(BLOCKS)]
        self.generation = 1
        self.stopped = False

    @precondition(lambda self: not self.stopped)
    @rule(block=blocks, page=pages, at=st.integers(0, SIZE - 1), piece=st.binary(max_size=40))
    def write(self, block, page, at, piece):
        start = page * SIZE + at
        piece = piece[: SIZE - at]
        self.source[block][start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        self.dirty[block].add(page)

    @precondition(lambda self: not self.stopped)
    @rule(block=blocks, page=pages, step=st.integers(1, 9), value=st.integers(0, 255))
    def fill(self, block, page, step, value):
        """All of it, every second byte, ..."""
        self.source[block][page * SIZE : (page + 1) * SIZE][::step] = value
        self.dirty[block].add(page)

    @precondition(lambda self: not self.stopped)
    @rule(block=blocks, chosen=st.sets(pages))
    def clear(self, block, chosen):
        for page in chosen:
            self.fill(block, page, 1, 0)

    @rule()
    def synchronise(self):
        self.generation += 1

    @rule(slots=st.sampled_from((1, 2, 4, 8, 32)))
    def resize(self, slots):
        self.cache.resize(slots * SIZE)

    @rule(block=blocks, most=st.integers(1, PAGES), room=st.integers(1100, 9000))
    def send(self, block, most, room):
        """Some of the dirty pages, as far as the room goes."""
        chosen = np.array(sorted(self.dirty[block])[:most], np.uint64)
        out = bytearray(room)
        named = bool(room % 2)
        done = self.kernels.pack_pages_xbzrle(
            self.cache,
            self.source[block],
            chosen,
            0,
            SIZE,
            NAME,
            named,
            block * PAGES,
            self.generation,
            self.stopped,
            out,
        )
        assert done.following > 0 or not len(chosen), "there is room for one page at least"
        count = self.receive(block, out[: done.size])
        assert done.normal == done.cache_miss + done.overflow
        assert count <= done.following == done.pages + done.cache_miss + done.zeros
        self.dirty[block] -= set(chosen[: done.following].tolist())

    def receive(self, block, data):
        rows = np.zeros(PAGES, ROW)
        stop, count = self.kernels.scan_records(data, 0, len(data), SIZE, PAGES * SIZE, NAME, rows)
        assert stop == len(data)
        rows = rows[:count]
        known, target = self.known[block], self.target[block]
        assert self.kernels.apply_records(target, rows, 0, data, SIZE, known) == count
        return count

    @rule()
    def stop(self):
        """The last stage; it may fail, and the guest goes on with the same cache."""
        self.stopped = True

    @precondition(lambda self: self.stopped)
    @rule()
    def go_on(self):
        self.stopped = False

    @invariant()
    def pages_that_are_not_dirty_are_the_same(self):
        for block in range(BLOCKS):
            for page in set(range(PAGES)) - self.dirty[block]:
                here, there = self.source[block], self.target[block]
                area = slice(page * SIZE, (page + 1) * SIZE)
                assert np.array_equal(here[area], there[area])

    @invariant()
    def cache_holds_what_the_destination_holds(self):
        for slot, tag in enumerate(self.cache.tags.tolist()):
            if tag != (1 << 64) - 1:
                assert tag % len(self.cache.tags) == slot
                block, page = divmod(tag, PAGES)
                held = self.cache.content[slot * SIZE : (slot + 1) * SIZE]
                assert np.array_equal(held, self.target[block][page * SIZE :][:SIZE])

    def teardown(self):
        """Whatever is left is sent; then all of memory is there."""
        self.stopped = True
        for block in range(BLOCKS):
            while self.dirty[block]:
                self.send(block, PAGES, 4000)
            assert np.array_equal(self.source[block], self.target[block])


class CompiledMigration(Migration):
    kernels = compiled


budget = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPlain = Migration.TestCase
TestPlain.settings = budget
TestCompiled = pytest.mark.skipif(not compiled, reason="the kernels are not compiled")(
    CompiledMigration.TestCase
)
TestCompiled.settings = budget
