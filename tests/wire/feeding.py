"""Feeding a reader in every way, and comparing what comes of it.

Events lend views of the reader's buffer, so they are settled (turned into plain values) and encoded
before more is fed.  Batches of pages depend on the sizes of reads and are taken apart into records.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from vmferry.errors import Place, StreamError, TruncatedStream
from vmferry.wire.buffer import ChannelReader, Cursor, Parse
from vmferry.wire.ram import RamPages


@dataclass
class Outcome:
    """What a reader made of its input."""

    events: list[Any] = field(default_factory=list)
    written: bytes = b""
    error: StreamError | None = None
    finished: bool = False
    consumed: int = 0

    def result(self) -> tuple[Any, ...]:
        """Everything that must not depend on the sizes of reads."""
        error = self.error
        told = None if error is None else (type(error), str(error), error.place)
        return self.events, self.written, told, self.finished

    @property
    def place(self) -> Place:
        assert self.error is not None
        return self.error.place


class Steps(ChannelReader[Any]):
    """A reader of one step of the grammar, or of several one behind the other."""

    def __init__(self, *steps: Callable[[Cursor], Parse[Any]], capacity: int = 256) -> None:
        self._parts = steps
        super().__init__("test", capacity)

    def _parse(self) -> Parse[None]:
        for step in self._parts:
            value = yield from step(self._at)
            if value is not None:
                yield value


def read(reader: ChannelReader[Any], pieces: Iterable[bytes], *, end: bool = True) -> Outcome:
    """Feed *pieces*, and the end of the input behind them."""
    outcome = Outcome()
    try:
        for piece in pieces:
            for event in reader.feed(piece) if piece else ():
                take(outcome, event)
        if end:
            for event in reader.feed(b""):
                take(outcome, event)
    except StreamError as error:
        outcome.error = error
    outcome.finished = reader.finished
    outcome.consumed = reader.buffer.offset
    return outcome


def take(outcome: Outcome, event: Any) -> None:
    """Note an event while its views are right."""
    if type(event).__module__.startswith("vmferry"):
        outcome.written += event.encode()
    if isinstance(event, RamPages):
        outcome.events += records(event)
    else:
        outcome.events.append(settled(event))


def records(batch: RamPages) -> Iterator[tuple[Any, ...]]:
    """The page records of a batch: place in the channel, block, header word, payload."""
    for word, position, length, _ in batch.rows.tolist():
        payload = bytes(batch.data[position : position + length])
        yield "page", batch.start + position, batch.block.name, word, payload


def settled(value: Any) -> Any:
    """*value* without views, to be compared with others."""
    match value:
        case memoryview() | bytearray():
            return bytes(value)
        case np.ndarray():
            return value.tolist()
        case tuple() | list():
            return [settled(item) for item in value]
        case enum.Enum():
            return value
    if is_dataclass(value):
        parts = {part.name: settled(getattr(value, part.name)) for part in fields(value)}
        return type(value).__name__, parts
    return value if type(value).__module__ == "builtins" else str(value)


def cuts(size: int) -> Iterable[int]:
    """Where to cut an input of *size* bytes in two: everywhere, or at some 300 places."""
    return range(1, size) if size <= 300 else {*range(1, size, size // 280), size - 2, size - 1}


def ways(data: bytes) -> Iterator[list[bytes]]:
    """Byte by byte, and in two pieces cut everywhere."""
    yield [data[at : at + 1] for at in range(len(data))]
    for cut in cuts(len(data)):
        yield [data[:cut], data[cut:]]


def read_in_every_way(make: Callable[[], ChannelReader[Any]], data: bytes) -> Outcome:
    """What *data* gives, having checked that it gives the same however it is cut into reads."""
    whole = read(make(), [data])
    for pieces in ways(data):
        outcome = read(make(), pieces)
        assert outcome.result() == whole.result(), f"cut at {len(pieces[0])} of {len(data)}"
    return whole


def check_round_trip(make: Callable[[], ChannelReader[Any]], data: bytes) -> list[Any]:
    """Read *data* in every way, check that it is written back byte for byte; gives the events."""
    outcome = read_in_every_way(make, data)
    assert outcome.error is None, outcome.error
    assert outcome.written == data
    return outcome.events


def check_truncation(make: Callable[[], ChannelReader[Any]], data: bytes) -> None:
    """Cut short anywhere *data* is refused as cut off, at a byte not behind the cut."""
    for size in cuts(len(data)):
        outcome = read(make(), [data[:size]])
        assert isinstance(outcome.error, TruncatedStream), (size, outcome.error)
        assert outcome.place.offset is not None
        assert outcome.place.offset <= size
        assert data.startswith(outcome.written)


def check_invariant(make: Callable[[], ChannelReader[Any]], data: bytes, cut: int) -> Outcome:
    """What holds for any bytes, fed whole and in pieces of pseudo-random sizes that *cut* chooses.

    Nothing but a StreamError comes out, the same in both ways and at a byte of the input, and what
    was read is written back byte for byte.
    """
    whole = read(make(), [data])
    assert read(make(), pieces(data, cut)).result() == whole.result()
    if whole.error is None:
        assert whole.written == data[: whole.consumed]
    else:
        assert whole.place.offset is not None
        assert 0 <= whole.place.offset <= len(data)
        assert data.startswith(whole.written)
        assert str(whole.error).isprintable()
    return whole


def pieces(data: bytes, seed: int) -> Iterator[bytes]:
    """*data* in pieces: some of a byte, most of up to a sixteenth of it."""
    chooser = random.Random(seed)  # noqa: S311
    at = 0
    while at < len(data):
        size = chooser.choice((1, 7, 1 + chooser.randrange(1 + len(data) // 16)))
        yield data[at : at + size]
        at += size
