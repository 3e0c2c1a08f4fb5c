"""Reading ELF64 core files, as far as tests need it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")

_HEAD = 64 << 10
"""Bytes that hold the headers and the notes of any core file here."""


@dataclass(frozen=True)
class Load:
    """A piece of memory: its address, and where in the file it is."""

    address: int
    offset: int
    size: int

    @property
    def end(self) -> int:
        return self.address + self.size


@dataclass(frozen=True)
class Core:
    """What stands before the memory in a core file."""

    machine: int
    notes: list[tuple[bytes, int, bytes]]
    loads: list[Load]


def read_core(path: Path) -> Core:
    """The headers and notes of the core file *path*."""
    head = part(path, 0, _HEAD)
    notes: list[tuple[bytes, int, bytes]] = []
    loads = []
    header = _HEADER.unpack_from(head)
    ident, kind, machine, _, _, at, *_, entry_size, count, _, _, _ = header
    assert (ident[:6], kind, entry_size) == (b"\x7fELF\x02\x01", 4, _PROGRAM_HEADER.size)
    for entry in _PROGRAM_HEADER.iter_unpack(head[at : at + entry_size * count]):
        segment, _, offset, virtual, address, size, size_in_memory, _ = entry
        assert size == size_in_memory
        if segment == 1:
            assert virtual == address
            loads.append(Load(address, offset, size))
        else:
            assert segment == 4
            notes += _notes(head[offset : offset + size])
    return Core(machine, notes, loads)


def part(path: Path, start: int, size: int) -> bytes:
    """*size* bytes from *start* of the file *path*, or what there is of them."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(size)


def _notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    found = []
    while data:
        name_size, size, kind = struct.unpack_from("<III", data)
        start = 12 + -(-name_size // 4) * 4
        end = start + -(-size // 4) * 4
        found.append((data[12 : 12 + name_size], kind, data[start : start + size]))
        data = data[end:]
    return found
