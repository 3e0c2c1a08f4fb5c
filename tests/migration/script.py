"""What a source sends, written by hand: pieces of a main channel and of multifd channels.

The machine is always the same small one, so that a test names only what it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import numpy as np

from tests.wire import described
from vmferry.pages import PAGE, ZERO
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import OpenReturnPath, Ping
from vmferry.wire.configuration import Configuration
from vmferry.wire.multifd import Hello, Method, encode_header
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

PAGE_SIZE = 4096
RAM = RamBlock("pc.ram", 64 * PAGE_SIZE)
ROM = RamBlock("pc.rom", 4 * PAGE_SIZE)
BLOCKS = RamBlocks((RAM, ROM))
OLD, NEW = "pc-i440fx-7.2", "pc-i440fx-8.1"

_RAM_NUMBER = 2
_END = RamEnd().encode()
_FOOTER = SectionFooter(_RAM_NUMBER).encode()


def fill(value: int, pages: int = 1) -> bytes:
    """Pages full of one byte."""
    return bytes([value]) * (pages * PAGE_SIZE)


def page(number: int, value: int, block: RamBlock = RAM) -> bytes:
    """A page record on the main channel."""
    word = (number * PAGE_SIZE | PAGE).to_bytes(8)
    return word + encode_name(block.name) + fill(value)


def zero(number: int, block: RamBlock = RAM) -> bytes:
    """The record of a zero page on the main channel."""
    return (number * PAGE_SIZE | ZERO).to_bytes(8) + encode_name(block.name) + b"\0"


def head(machine: str | None = OLD, *, return_path: bool = False) -> bytes:
    """Everything before the first section."""
    out = Header().encode()
    if machine is not None:
        out += Configuration(machine).encode()
    if return_path:
        out += OpenReturnPath().encode() + Ping(1).encode()
    return out


def start(*records: bytes, blocks: RamBlocks = BLOCKS) -> bytes:
    """The `ram` section begins."""
    first = SectionStart(_RAM_NUMBER, "ram", 0, 4).encode()
    return first + blocks.encode() + b"".join(records) + _END + _FOOTER


def part(*records: bytes) -> bytes:
    """A part of the `ram` section."""
    return SectionPart(_RAM_NUMBER, "ram").encode() + b"".join(records) + _END + _FOOTER


def end(*records: bytes) -> bytes:
    """The end of the `ram` section."""
    return SectionEnd(_RAM_NUMBER, "ram").encode() + b"".join(records) + _END + _FOOTER


def devices(*names: str) -> bytes:
    """Device sections of three bytes, the end of the stream, and the description."""
    sections = [
        described.section(number, name, b"abc") for number, name in enumerate(names or ("timer",))
    ]
    listed = [described.device(name, 3) for name in names or ("timer",)]
    return described.tail(b"".join(sections), described.description(*listed))


def plain(*records: bytes, machine: str | None = OLD, return_path: bool = False) -> bytes:
    """A whole stream with these records of guest memory."""
    before = head(machine, return_path=return_path)
    return before + start() + part(*records) + end() + devices()


EOF = EndOfStream().encode()


# multifd


def hello(channel: int) -> bytes:
    """The initial packet of a channel."""
    return Hello(UUID(int=0), channel).encode()


def packet(
    pages: Sequence[int] = (),
    value: int = 0,
    *,
    sync: bool = False,
    block: RamBlock = RAM,
    zeros: Sequence[int] = (),
    payload: bytes | None = None,
    method: Method = Method.NONE,
    payload_size: int | None = None,
) -> bytes:
    """A packet of pages full of *value*, and of zero pages as QEMU 9.0 sends them."""
    data = fill(value, len(pages)) if payload is None else payload
    offsets = np.array([*pages, *zeros], np.uint64) * np.uint64(PAGE_SIZE)
    header = bytearray(
        encode_header(
            block if len(offsets) else None,
            offsets,
            payload_size=len(data) if payload_size is None else payload_size,
            number=1,
            page_size=PAGE_SIZE,
            method=method,
            sync=sync,
        )
    )
    header[16:20] = len(pages).to_bytes(4)
    header[32:36] = len(zeros).to_bytes(4)
    return bytes(header) + data


def sync() -> bytes:
    """An empty packet that synchronises."""
    return packet(sync=True)
