"""What is left to send: every page with content once, in whatever order it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmferry.errors import StreamError
from vmferry.migration.postcopy.left import Block, Left, Run
from vmferry.migration.postcopy.records import Records
from vmferry.wire.buffer import Cursor, ReceiveBuffer
from vmferry.wire.ram import RamBlock, RamPages, RamReader

PAGE = 4096


class Memory:
    """Memory whose pages hold their numbers, where *data* says that there is any."""

    def __init__(self, data: Sequence[bool], unit: int) -> None:
        self.data = np.repeat(np.array(data, np.bool_), unit // PAGE)
        self.sums = self.data.astype(np.uint64)

    def read(self, offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            pages = range(offset // PAGE, (offset + len(buffer)) // PAGE)
            buffer[:] = b"".join(
                (bytes([1 + page % 255]) if self.data[page] else b"\0") * PAGE for page in pages
            )
            offset += len(buffer)

    def data_from(self, offset: int) -> tuple[int, int] | None:
        at = np.flatnonzero(self.data[offset // PAGE :])
        if not len(at):
            return None
        first = offset // PAGE + int(at[0])
        end = np.flatnonzero(~self.data[first:])
        return first * PAGE, (first + int(end[0]) if len(end) else len(self.data)) * PAGE


def block(name: str, data: Sequence[bool], unit: int = PAGE) -> Block:
    return Block(RamBlock(name, len(data) * unit), Memory(data, unit), unit)


def units(run: Run) -> list[tuple[str, int]]:
    return [(run.block.ram.name, run.first + i) for i in range(run.count)]


CONTENT = st.lists(st.booleans(), min_size=1, max_size=40)


@given(st.lists(CONTENT, min_size=1, max_size=3), st.data())
def test_every_unit_is_sent_at_most_once_and_all_content_is(
    contents: list[list[bool]], data: st.DataObject
) -> None:
    blocks = [block(f"block{i}", content) for i, content in enumerate(contents)]
    left = Left(blocks)
    assert left.remaining == sum(map(sum, contents)) * PAGE
    place = st.integers(0, len(blocks) - 1).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, len(contents[n]) - 1))
    )
    left.expect(data.draw(st.lists(place, max_size=10)))
    asked: set[tuple[str, int]] = set()
    sent: list[tuple[str, int]] = []
    for _ in range(200):
        if data.draw(st.booleans()):
            number, unit = data.draw(place)
            name = f"block{number}"
            left.ask(name, unit * PAGE, PAGE)
            asked.add((name, unit))
            while (run := left.urgent()) is not None:
                sent += units(run)
        most = data.draw(st.integers(1, 8))
        run = left.soon(most) or left.next(most)
        if run is None:
            break
        assert run.count <= most
        sent += units(run)
    else:
        pytest.fail("there is no end")
    assert len(sent) == len(set(sent))
    assert left.remaining == 0
    full = {(f"block{i}", j) for i, c in enumerate(contents) for j, has in enumerate(c) if has}
    assert full | asked <= set(sent)


@pytest.mark.parametrize(
    ("name", "start", "length", "what"),
    [
        ("nobody", 0, PAGE, "RAM block of this machine"),
        (None, 0, PAGE, "no block yet"),
        ("ram", 4 * PAGE, PAGE, "below 0x4000"),
        ("ram", 0, 5 * PAGE, "below 0x4000"),
        ("ram", 12, PAGE, "pages of 4096"),
        ("ram", 0, 12, "pages of 4096"),
    ],
)
def test_requests_for_what_is_not_there_are_refused(
    name: str | None, start: int, length: int, what: str
) -> None:
    left = Left([block("ram", [True] * 4)])
    with pytest.raises(StreamError, match=what):
        left.ask(name, start, length)


def test_flood_of_requests_is_bounded() -> None:
    left = Left([block("ram", [True] * (1 << 17))])
    with pytest.raises(StreamError, match="at most 65536 pages"):
        left.ask("ram", 0, 1 << 29)
    left.ask("ram", 0, 1 << 28)
    with pytest.raises(StreamError, match="waited for"):
        left.ask("ram", 1 << 28, PAGE)


def read(parts: Sequence[bytes | memoryview], blocks: Sequence[RamBlock]) -> dict[int, bytes]:
    """The pages of records, by offset."""
    reader = RamReader(page_size=PAGE, max_ram=1 << 40, postcopy=True)
    reader.blocks.update({b.name: b for b in blocks})
    buffer = ReceiveBuffer()
    whole = b"".join(map(bytes, parts)) + (0x10).to_bytes(8)
    buffer.room()[: len(whole)] = whole
    buffer.received(len(whole))
    pages = {}
    for event in reader.body(Cursor(buffer)):
        if isinstance(event, RamPages):
            for word, position, length, _ in event.rows.tolist():
                content = bytes(event.data[position : position + length])
                pages[word & ~(PAGE - 1)] = content if length == PAGE else bytes(PAGE)
    return pages


@given(CONTENT, st.sampled_from([PAGE, 4 * PAGE]), st.booleans(), st.data())
def test_records_of_a_run_are_its_pages(
    content: list[bool], unit: int, asked: bool, data: st.DataObject
) -> None:
    made = block("ram", content, unit)
    first = data.draw(st.integers(0, len(content) - 1))
    count = data.draw(st.integers(1, len(content) - first))
    records = Records(PAGE, 40 * unit)
    parts, full = records.of(Run(made, first, count), asked=asked)
    expected = {}
    buffer = bytearray(PAGE)
    for page in range(first * unit // PAGE, (first + count) * unit // PAGE):
        made.store.read(page * PAGE, memoryview(buffer))
        if asked or content[page * PAGE // unit]:
            expected[page * PAGE] = bytes(buffer)
    assert read(parts, [made.ram]) == expected
    assert full == sum(any(page) for page in expected.values())
