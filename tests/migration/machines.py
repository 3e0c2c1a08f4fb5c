"""Machines at rest in this process's memory, and made-up ones for hypothesis."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tests.wire import described
from tests.wire.strategies import bitmap_bodies
from vmferry.pages import page_sums
from vmferry.wire.bitmap import BitmapRecord, BitmapsEnd
from vmferry.wire.configuration import Configuration
from vmferry.wire.layout import DISK_CHUNK_SIZE
from vmferry.wire.ram import RamBlock

PAGE_SIZE = 4096


class Memory:
    """Bytes as a source reads them."""

    def __init__(self, content: bytes, page_size: int) -> None:
        self._content = content
        self.sums: npt.NDArray[np.uint64] = np.zeros(len(content) // page_size, np.uint64)
        page_sums(content, page_size, self.sums)

    def read(self, offset: int, *buffers: memoryview) -> None:
        for buffer in buffers:
            buffer[:] = self._content[offset : offset + len(buffer)]
            offset += len(buffer)


OLD = Configuration("pc-i440fx-7.2")
TIMER = described.Stream((described.device("timer", 3),), (b"abc",), True)


@dataclass(frozen=True, kw_only=True)
class Resting:
    """A machine: the content of its blocks and disks, and its devices as a stream has them."""

    configuration: Configuration | None = OLD
    memories: Mapping[str, bytes] = field(default_factory=lambda: {"pc.ram": bytes(PAGE_SIZE)})
    images: Mapping[str, bytes] = field(default_factory=dict)
    bitmaps: Sequence[BitmapRecord] = ()
    state: described.Stream = TIMER
    page_size: int = PAGE_SIZE

    @property
    def footers(self) -> bool:
        return self.state.footers

    @property
    def blocks(self) -> list[RamBlock]:
        return [RamBlock(name, len(content)) for name, content in self.memories.items()]

    def memory(self, block: RamBlock) -> Memory:
        return Memory(self.memories[block.name], self.page_size)

    @property
    def disks(self) -> list[tuple[str, Memory]]:
        return [(name, Memory(data, DISK_CHUNK_SIZE)) for name, data in self.images.items()]

    @property
    def numbers(self) -> frozenset[int]:
        return frozenset(range(len(self.state.devices)))

    @property
    def early(self) -> Sequence[bytes]:
        return ()

    @property
    def devices(self) -> Sequence[bytes]:
        return [self.state.sections]

    @property
    def description(self) -> bytes:
        return self.state.text


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311


def content(draw: st.DrawFn, pages: int, page_size: int) -> bytes:
    """Pages that are zero, full of one byte, or noise."""
    kinds = draw(st.lists(st.sampled_from("zzzof"), min_size=pages, max_size=pages))
    made = {
        "z": lambda _: bytes(page_size),
        "o": lambda n: bytes([n % 255 + 1]) * page_size,
        "f": lambda n: noise(n, page_size),
    }
    return b"".join(made[kind](number) for number, kind in enumerate(kinds))


@st.composite
def machines(draw: st.DrawFn) -> Resting:
    """Any machine."""
    names = st.text("abc.é/:", min_size=1, max_size=8)
    blocks = draw(st.dictionaries(names, st.integers(1, 300), min_size=1, max_size=4))
    state = draw(described.streams())
    version = draw(st.sampled_from(["7.2", "8.1", "9.0"]))
    uuid = draw(st.none() | st.just(UUID(int=5)))
    bitmaps = draw(st.just([]) | bitmap_bodies())
    disks = draw(st.dictionaries(st.sampled_from(["vda", "ide0-hd0"]), st.integers(1, 3)))
    return Resting(
        configuration=Configuration(f"pc-q35-{version}", uuid=uuid) if state.footers else None,
        memories={name: content(draw, pages, PAGE_SIZE) for name, pages in blocks.items()},
        images={
            name: b"".join(
                draw(st.sampled_from([bytes(DISK_CHUNK_SIZE), noise(1, DISK_CHUNK_SIZE)]))
                for _ in range(chunks)
            )
            for name, chunks in disks.items()
        },
        bitmaps=[record for record in bitmaps if not isinstance(record, BitmapsEnd)],
        state=replace(state, footers=state.footers),
    )
