"""A postcopy source that says what it is told to, right or wrong."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import vmferry
from vmferry.pages import PAGE, ZERO
from vmferry.transports import connect
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import (
    Command,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyRun,
)
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd
from vmferry.wire.return_path import Message, Pong, RequestPages, ReturnPathReader
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionFooter,
    SectionPart,
    SectionStart,
)

SIZE = 4096
LOADED = 3


class Scripted:
    """Has the machine of *checkpoint*, and a connection to what waits at *uri*."""

    def __init__(self, checkpoint: vmferry.Checkpoint, uri: str) -> None:
        self.checkpoint = checkpoint
        self.channel = connect(uri)
        self.heard: list[Message] = []
        self._reader = ReturnPathReader(max_bitmap=1 << 20)
        (self.block,) = checkpoint.blocks
        self.pages = self.block.length // SIZE

    def say(self, *parts: bytes) -> None:
        self.channel.send([part for part in parts if part])

    def begin(
        self,
        *commands: Command,
        advise: PostcopyAdvise | None = None,
        before: bytes = b"",
        block: RamBlock | None = None,
    ) -> None:
        """Everything up to the package, with *commands* and the section parts *before* in it."""
        configuration = self.checkpoint.configuration
        assert configuration is not None
        self.say(
            Header().encode(),
            configuration.encode(),
            OpenReturnPath().encode(),
            (advise or PostcopyAdvise(SIZE, SIZE)).encode(),
            *(command.encode() for command in commands),
            SectionStart(1, "ram", 0, 4).encode(),
            RamBlocks((block or RamBlock(self.block.name, self.block.length),)).encode(),
            self.end_of_part(),
            before,
        )

    def package(self, *commands: Command, devices: bytes | None = None) -> None:
        """The package, and the beginning of a part; *commands* stand before it."""
        if devices is None:
            devices = b"".join(map(bytes, self.checkpoint.devices))
        content = [
            PostcopyListen().encode(),
            devices,
            Ping(LOADED).encode(),
            PostcopyRun().encode(),
        ]
        self.say(
            *(command.encode() for command in commands),
            Package(b"".join(content)).encode(),
            SectionPart(1, "ram").encode(),
        )

    def end_of_part(self) -> bytes:
        footers = self.checkpoint.footers
        return RamEnd().encode() + (SectionFooter(1).encode() if footers else b"")

    def part(self, *records: bytes) -> bytes:
        """A whole part of guest memory."""
        return SectionPart(1, "ram").encode() + b"".join(records) + self.end_of_part()

    def page(self, number: int, content: bytes | None = None) -> bytes:
        """The record of a page, by default with what it has in the checkpoint."""
        if content is None:
            store = self.checkpoint.memory(self.block)
            assert store is not None
            store.read(number * SIZE, memoryview(data := bytearray(SIZE)))
            content = bytes(data)
        name = encode_name(self.block.name)
        if not any(content):
            return (number * SIZE | ZERO).to_bytes(8) + name + b"\0"
        return (number * SIZE | PAGE).to_bytes(8) + name + content

    def rest(self, *, but: int = -1) -> bytes:
        """All pages except one."""
        return b"".join(self.page(n) for n in range(self.pages) if n != but)

    def end(self) -> None:
        """The end of the part that is open, and of all."""
        self.say(self.end_of_part(), EndOfStream().encode())

    def hear(self, wanted: Callable[[Message], bool]) -> Message:
        """Wait for such an answer."""
        while True:
            for message in self.heard:
                if wanted(message):
                    self.heard.remove(message)
                    return message
            buffer = self._reader.buffer
            count = self.channel.recv_into(buffer.room(), 30.0)
            assert count, f"the end, after {self.heard}"
            buffer.received(count)
            self.heard += self._reader.events()

    def hear_loaded(self) -> None:
        self.hear(lambda message: message == Pong(LOADED))

    def hear_request(self) -> int:
        """The number of a page that is asked for."""
        found = self.hear(lambda message: isinstance(message, RequestPages))
        assert isinstance(found, RequestPages)
        assert found.length == SIZE
        return found.start // SIZE

    def close(self) -> None:
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.close()
