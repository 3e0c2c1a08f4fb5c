"""Small machines with declared devices, for tests of the registry and of snapshots."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from vmferry import PieceReader, PieceWriter, Registry
from vmferry.vmstate import (
    U8,
    U16,
    U32,
    Array,
    Buffer,
    Local,
    Queue,
    VarArray,
    device,
    since,
    state,
    subsection,
)


@state("uart/overrun")
@dataclass
class Overrun:
    lost: U32 = 0


@device("uart", version=2, minimum_version=1)
@dataclass
class Uart:
    divider: U16 = 1
    fifo: Annotated[bytearray, Buffer(4)] = field(default_factory=lambda: bytearray(4))
    speed: Annotated[U8, since(2)] = 0
    overrun: Annotated[Overrun | None, subsection] = None
    loaded: Local[list[str]] = field(default_factory=list, compare=False)

    def post_load(self, version: int) -> None:
        if self.divider == 0:
            raise ValueError("a divider of 0")
        self.loaded.append(f"uart {self.divider} version {version}")


@state("channel")
@dataclass
class Channel:
    count: U32 = 0
    mode: U8 = 0


@device("timer", version=1, priority=10)
@dataclass
class Timer:
    channels: Annotated[list[Channel], Array(3)] = field(
        default_factory=lambda: [Channel() for _ in range(3)]
    )
    size: U8 = 0
    log: Annotated[list[U16], VarArray("size", 8)] = field(default_factory=list)
    waiting: Annotated[list[Channel], Queue(8)] = field(default_factory=list)


@device("passthrough", unmigratable="it holds a card of this host")
@dataclass
class Passthrough:
    pass


@dataclass
class Board:
    name: str = "board-1.0"
    registry: Registry = field(default_factory=Registry)


class Disk:
    """A disk of 100 bytes, sent 16 at a time."""

    name = "disk"
    version = 3
    chunk = 20

    def __init__(self, content: bytes = bytes(100)) -> None:
        self.content = bytearray(content)
        self.sent = 0
        self.calls: list[str] = []

    def setup(self, piece: PieceWriter) -> None:
        self.calls.append("setup")
        self.sent = 0
        piece.number(len(self.content), 4)

    def pending(self) -> int:
        return len(self.content) - self.sent

    def iterate(self, piece: PieceWriter) -> None:
        part = self.content[self.sent : self.sent + 16]
        piece.number(self.sent, 4)
        piece.write(part)
        self.sent += len(part)

    def complete(self, piece: PieceWriter) -> None:
        self.calls.append(f"complete {piece.room}")

    def cleanup(self) -> None:
        self.calls.append("cleanup")

    def load(self, piece: PieceReader, version: int) -> None:
        self.calls.append(f"load {version}: {len(piece)}")
        if len(piece) > 4:
            start = piece.number(4)
            data = piece.read(len(piece))
            self.content[start : start + len(data)] = data
        elif len(piece) and piece.number(4) != len(self.content):
            raise ValueError("a disk of another size")


def board(*devices: object, name: str = "board-1.0", disk: Disk | None = None) -> Board:
    made = Board(name)
    for item in devices:
        made.registry.register(item)
    if disk is not None:
        made.registry.register_iterative(disk)
    return made
