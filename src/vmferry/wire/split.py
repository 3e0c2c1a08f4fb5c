"""Device sections: where each begins and ends.

QEMU 7.2 ``migration/savevm.c`` writes them one behind the other, each as ``04``, number, name,
instance, version, body, and the number again in a footer (machine types from 2.4 on).  No body says
how long it is.  What does is the description behind them (:mod:`.description`); where that does not
hold for one device, the head of the next device is looked for behind this one's footer, so that one
false size costs one body and not the rest.  Without a description footers alone must do, and the
sections say so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import zip_longest
from struct import Struct
from typing import Any, Final, TypeAlias

from vmferry.errors import LimitExceeded, StreamError, TruncatedStream, printable

from . import limits
from .buffer import decode_name, encode_name
from .description import DeviceDescription, VmDescription, body_size
from .layout import Kind
from .sections import SectionFooter, SectionStart

FOOTER_SIZE: Final = 5
TRIES: Final = 1000
"""Places looked at for the end of one body; in earnest it is the first."""

_NUMBER: Final = Struct(">I")
_NUMBERS: Final = Struct(">II")

_FOOTER: Final = bytes([Kind.FOOTER])
_UNDESCRIBED: Final = "no description: its end was found by its footer"

_PRINTABLE: Final = re.compile(rb"[\x20-\x7e]+")

_COMMANDS: Final = frozenset(
    bytes.fromhex(f"08 {command}") for command in ("0002 0004", "0005 0000")
)
"""What follows the devices in a package: the heads of PING and RUN."""

_GOING_ON: Final = frozenset((Kind.START, Kind.PART, Kind.END, Kind.FULL, Kind.COMMAND))


@dataclass(frozen=True, slots=True)
class DeviceSection:
    """The state of one device, as it came.

    ``offset`` is that of the section's first byte in its channel.  ``described`` says whether the
    stream's own description holds for the body; where not, ``reason`` says why.
    """

    number: int
    name: str
    instance: int
    version: int
    offset: int
    body: bytes | memoryview = field(repr=False)
    footer: bool
    described: bool = True
    reason: str | None = None

    @property
    def head(self) -> bytes:
        """What stands before the body."""
        start = SectionStart(self.number, self.name, self.instance, self.version)
        return start.encode(Kind.FULL)

    @property
    def body_offset(self) -> int:
        """Where in its channel the body begins."""
        return self.offset + len(self.head)

    @property
    def size(self) -> int:
        """Bytes of the whole section."""
        return len(self.head) + len(self.body) + (FOOTER_SIZE if self.footer else 0)

    def encode(self) -> bytes:
        """The section as on the wire."""
        footer = SectionFooter(self.number).encode() if self.footer else b""
        return b"".join((self.head, self.body, footer))


@dataclass(frozen=True, slots=True)
class DeviceRegion:
    """Device sections that nothing tells apart: neither a description nor footers."""

    offset: int
    body: bytes | memoryview = field(repr=False)
    name: str = "devices"
    reason: str = "neither a description nor footers tell its devices apart"

    @property
    def size(self) -> int:
        """Bytes of all sections."""
        return len(self.body)

    def encode(self) -> bytes:
        """The sections as on the wire."""
        return bytes(self.body)


Decode: TypeAlias = Callable[[SectionStart, memoryview, int], tuple[int, Any]]
"""Reads the body of a device whose class is known.

Gets the section's head, what follows it, and the offset of the section; returns the bytes of the
body and what was made of them.  Raises :class:`StreamError` for a device or body that it cannot
read, and may be called again for the same device, for the end of a stream shows only behind it.
"""


@dataclass(frozen=True, slots=True)
class DecodedDevices:
    """Device sections that the reader's caller has decoded, one behind the other.

    ``body`` are the bytes of them all, ``states`` what its :data:`Decode` made of each.
    """

    offset: int
    body: bytes
    states: tuple[Any, ...]
    name: str = "devices"

    @property
    def size(self) -> int:
        """Bytes of all sections."""
        return len(self.body)

    def encode(self) -> bytes:
        """The sections as on the wire."""
        return self.body


def split_devices(
    data: bytes | memoryview,
    description: VmDescription,
    *,
    footers: bool,
    offset: int,
    early: int = 0,
) -> tuple[DeviceSection, ...]:
    """Cut the device sections of a stream apart, exactly as *description* lists them.

    *data*, which is copied once, runs from the first section's type byte to just before the
    end-of-stream byte; *offset* is its place in the channel.  *early* is how many of the described
    devices came before it, apart from the others (QEMU 8.0).  Raises :class:`StreamError` where
    name or instance differ from what is described, where devices are missing or too many, and where
    the end of a body cannot be found.
    """
    raw = bytes(data)
    sections: list[DeviceSection] = []
    at = 0
    devices = description.devices[early:]
    for device, following in zip_longest(devices, devices[1:]):
        try:
            section = _cut(raw, at, device, following, footers=footers, offset=offset)
        except StreamError as error:
            raise error.within(offset=offset + at, section=device.name) from None
        sections.append(section)
        at += section.size
    if at != len(data):
        raise StreamError(
            f"the end of the stream behind {len(devices)} devices",
            f"{len(data) - at} bytes more",
            offset=offset + at,
        )
    return tuple(sections)


def split_by_footers(data: bytes | memoryview, offset: int = 0) -> tuple[DeviceSection, ...]:
    """Cut device sections apart by their footers, where there is no description.

    *data* begins with a section.  A body ends at the first footer with its number that is followed
    by the end of *data*, by the head of a device with a printable name, or by the commands that end
    a package; there the search stops too, so the sections may end before *data* does.  A device
    that holds such bytes by chance is cut short, and what follows is refused or misread: the
    sections are marked as not described, and fit for looking at.
    """
    raw = bytes(data)
    sections: list[DeviceSection] = []
    at = 0
    while at < len(raw) and (at == 0 or raw[at] == Kind.FULL):
        if len(sections) == limits.DEVICE_COUNT:
            most = f"at most {limits.DEVICE_COUNT} devices"
            raise LimitExceeded(most, "more", offset=offset + at)
        try:
            head, start = read_head(raw, at, offset)
            end = _end_by_footer(raw, start, head.number)
        except StreamError as error:
            raise error.within(offset=offset + at) from None
        body = memoryview(raw)[start:end]
        sections.append(make_section(head, body, offset + at, True, _UNDESCRIBED))
        at = end + FOOTER_SIZE
    return tuple(sections)


def split_by_decoding(
    data: bytes | memoryview, decode: Decode, *, footers: bool, offset: int
) -> DecodedDevices:
    """Decode the device sections of a stream, whose ends *decode* knows.

    Arguments as for :func:`split_devices`.
    """
    raw = bytes(data)
    view = memoryview(raw)
    states: list[Any] = []
    at = 0
    while at < len(raw):
        if len(states) == limits.DEVICE_COUNT:
            most = f"at most {limits.DEVICE_COUNT} devices"
            raise LimitExceeded(most, "more", offset=offset + at)
        head, start = read_head(raw, at, offset)
        size, state = decode(head, view[start:], offset + at)
        footer = _FOOTER + raw[at + 1 : at + 5]
        at = start + size
        if footers:
            if not raw.startswith(footer, at):
                found = raw[at : at + FOOTER_SIZE].hex(" ") or "the end"
                raise StreamError(
                    f"the footer {footer.hex(' ')}", found, offset=offset + at, section=head.name
                )
            at += FOOTER_SIZE
        states.append(state)
    return DecodedDevices(offset, raw, tuple(states))


def _cut(
    raw: bytes,
    at: int,
    device: DeviceDescription,
    following: DeviceDescription | None,
    *,
    footers: bool,
    offset: int,
) -> DeviceSection:
    head, start = read_head(raw, at, offset)
    if (head.name, head.instance) != (device.name, device.instance):
        raise StreamError(
            f"device {printable(device.name)} instance {device.instance}, the next described",
            f"{printable(head.name)} instance {head.instance}",
        )
    reason = None
    try:
        end = start + body_size(device, raw, start)
        _check_end(raw, end, head.number if footers else None, last=following is None)
    except StreamError as error:
        anchor = _end_by_anchor(raw, start, head.number, following) if footers else None
        if anchor is None:
            raise
        end = anchor
        reason = f"its description does not hold: {error}"
    return make_section(head, memoryview(raw)[start:end], offset + at, footers, reason)


def make_section(
    head: SectionStart, body: memoryview, offset: int, footer: bool, reason: str | None
) -> DeviceSection:
    """The section of *head* and *body*; *reason* says why it is not described, if so."""
    return DeviceSection(
        head.number,
        head.name,
        head.instance,
        head.version,
        offset,
        body,
        footer,
        described=reason is None,
        reason=reason,
    )


def _check_end(raw: bytes, end: int, number: int | None, *, last: bool) -> None:
    """What must stand behind a body: its footer where *number* is given, then the next section."""
    if number is not None:
        footer = SectionFooter(number).encode()
        found = raw[end : end + FOOTER_SIZE]
        if found != footer:
            raise StreamError(f"the footer {footer.hex(' ')}", found.hex(" ") or "the end")
        end += FOOTER_SIZE
    behind = raw[end : end + 8].hex(" ") or "the end"
    if last and end < len(raw):
        raise StreamError("the end behind the last device described", behind)
    if not last and raw[end : end + 1] != bytes([Kind.FULL]):
        raise StreamError("the next device behind the body", behind)


def _end_by_anchor(
    raw: bytes, start: int, number: int, following: DeviceDescription | None
) -> int | None:
    """Where the body ends if its footer and the next device's head, with its name, tell."""
    footer = SectionFooter(number).encode()
    if following is None:
        end = len(raw) - FOOTER_SIZE
        return end if end >= start and raw.endswith(footer) else None
    marker = footer + bytes([Kind.FULL])
    identity = encode_name(following.name) + following.instance.to_bytes(4)
    stop = start + limits.DEVICE_SECTION + 2 * len(marker) + len(identity)
    at = start
    for _ in range(TRIES):
        at = raw.find(identity, at, stop)
        if at < 0:
            break
        # Between the marker and the name stands the next section's number, which can be any.
        end = at - 4 - len(marker)
        if end >= start and raw.startswith(marker, end):
            return end
        at += 1
    return None


def _end_by_footer(raw: bytes, start: int, number: int) -> int:
    footer = SectionFooter(number).encode()
    stop = start + limits.DEVICE_SECTION + FOOTER_SIZE
    at = start
    for _ in range(TRIES):
        at = raw.find(footer, at, stop)
        if at < 0:
            break
        behind = at + FOOTER_SIZE
        if behind == len(raw) or goes_on(raw, behind):
            return at
        at += 1
    raise StreamError(f"the footer {footer.hex(' ')} and a section behind the body", "none")


def goes_on(data: bytes | memoryview, at: int, numbers: Collection[int] = ()) -> bool | None:
    """Whether something of a stream starts at *at*; ``None`` where too few bytes are there to tell.

    *numbers* are those of the iterable sections that may have a part here.
    """
    rest = bytes(data[at : at + 14 + 255])
    kind = rest[0] if rest else None
    if kind in (Kind.START, Kind.FULL) and len(rest) >= 6:
        name = rest[6 : 6 + rest[5]]
        if rest[5] == 0 or (name and not _PRINTABLE.fullmatch(name)):
            return False
        return True if len(rest) >= 14 + rest[5] else None
    if kind in (Kind.PART, Kind.END) and len(rest) >= 5:
        return int.from_bytes(rest[1:5]) in numbers
    if kind == Kind.COMMAND and len(rest) >= 5:
        return rest[:5] in _COMMANDS
    return None if kind is None or kind in _GOING_ON else False


def read_head(raw: bytes, at: int, offset: int) -> tuple[SectionStart, int]:
    """The head of the device section at *at*, and where its body begins."""
    if at < len(raw) and raw[at] != Kind.FULL:
        raise StreamError("a device section (04)", f"the type byte {raw[at]:#04x}")
    start = at + 14 + (raw[at + 5] if at + 5 < len(raw) else 0)
    if start > len(raw):
        raise TruncatedStream("the head of a device section", f"{len(raw) - at} bytes")
    name = decode_name(raw[at + 6 : start - 8], "the name of a device", offset + at + 5)
    (number,) = _NUMBER.unpack_from(raw, at + 1)
    instance, version = _NUMBERS.unpack_from(raw, start - 8)
    return SectionStart(number, name, instance, version), start
