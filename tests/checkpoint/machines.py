"""Saved machines made by hand: the blocks and the device state that a test needs, no more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmferry import Checkpoint, receive
from vmferry.wire.buffer import encode_name
from vmferry.wire.configuration import Configuration
from vmferry.wire.layout import IGNORE_SHARED, Kind
from vmferry.wire.ram import RamBlock, RamBlocks, RamEnd
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30

_RAM = 1
_PAGE_RECORD = 0x008


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device section: ``fields`` of a state of the kind ``kind``, each a number or bytes."""

    kind: str
    fields: Sequence[tuple[str, str, bytes] | tuple[str, str, int, bytes]]
    name: str = ""
    instance: int = 0

    def described(self) -> dict[str, Any]:
        fields = []
        for name, kind, *count, data in self.fields:
            entry: dict[str, Any] = {"name": name, "type": kind, "size": len(data)}
            if count:
                entry |= {"array_len": count[0], "size": len(data) // count[0]}
            fields.append(entry)
        head = {"name": self.name or self.kind, "instance_id": self.instance}
        return head | {"vmsd_name": self.kind, "version": 1, "fields": fields}

    def encode(self, number: int) -> bytes:
        start = SectionStart(number, self.name or self.kind, self.instance, 1)
        body = b"".join(field[-1] for field in self.fields)
        return start.encode(Kind.FULL) + body + SectionFooter(number).encode()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A machine: its blocks with their sizes, pages by block and offset, devices."""

    machine: str | None = "microvm"
    blocks: Mapping[str, int] = field(default_factory=lambda: {"microvm.ram": 16 * MIB})
    addresses: Mapping[str, int] | None = None
    pages: Mapping[tuple[str, int], bytes] = field(default_factory=dict)
    devices: Sequence[Device] = ()
    description: bool = True

    def stream(self) -> bytes:
        """What QEMU would have written."""
        at = self.addresses
        shared = () if at is None else (IGNORE_SHARED,)
        blocks = tuple(
            RamBlock(name, size, address=None if at is None else at[name])
            for name, size in self.blocks.items()
        )
        parts: list[bytes] = [Header().encode()]
        if self.machine is not None:
            parts.append(Configuration(self.machine, capabilities=shared).encode())
        foot = SectionFooter(_RAM).encode()
        end = bytes(RamEnd().encode())
        parts += [SectionStart(_RAM, "ram", 0, 4).encode(), RamBlocks(blocks).encode(), end, foot]
        parts += [SectionPart(_RAM, "ram").encode(), *self._pages(), end, foot]
        parts += [SectionEnd(_RAM, "ram").encode(), end, foot]
        parts += [device.encode(number) for number, device in enumerate(self.devices, 2)]
        parts.append(EndOfStream().encode())
        if self.description:
            devices = [device.described() for device in self.devices]
            text = json.dumps({"page_size": PAGE, "devices": devices}).encode()
            parts.append(bytes([Kind.DESCRIPTION]) + len(text).to_bytes(4) + text)
        return b"".join(parts)

    def _pages(self) -> Iterable[bytes]:
        for (block, offset), data in self.pages.items():
            yield (offset | _PAGE_RECORD).to_bytes(8) + encode_name(block) + data.ljust(PAGE, b"\0")

    def checkpoint(self, directory: Path) -> Checkpoint:
        """The machine received."""
        path = directory / "stream"
        path.write_bytes(self.stream())
        return receive(f"file:{path}", directory / "checkpoint")


def clock(below: int, above: int = 0) -> Device:
    """The clock of a machine with so much memory below and above 4 GiB."""
    cmos = bytearray(128)
    cmos[0x34:0x36] = (max(below - 16 * MIB, 0) >> 16).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    return Device(kind="mc146818rtc", fields=[("cmos_data", "buffer", bytes(cmos))])


def bridge(kind: str = "I440FX", pam: bytes = b"\x30" + b"\x33" * 6) -> Device:
    """A host bridge with these PAM registers; without them, memory shows everywhere."""
    config = bytearray(256)
    start = {"I440FX": 0x59, "mch": 0x90}[kind]
    config[start : start + 7] = pam
    return Device(
        kind=kind,
        name=f"0000:00:00.0/{kind}",
        fields=[("config[0]", "pci config", bytes(config))],
    )
