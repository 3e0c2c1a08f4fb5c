"""The end of the device sections, found while they come in.

QEMU 7.2 ``migration/savevm.c``: behind the last device stand the end-of-stream byte and the closing
description, and no length anywhere says when.  A source with a return path does not close its
channel either.  So the description has to be recognised by what it is: readable, and true of all
the bytes before it.  A device with early state (QEMU 8.0) stands between iterable sections instead;
there the footer and what follows it must do.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, TypeAlias

from vmferry.errors import LimitExceeded, StreamError, TruncatedStream, printable

from . import limits
from .description import UnreadDescription, VmDescription, parse_description
from .layout import Kind
from .sections import SectionFooter
from .split import (
    FOOTER_SIZE,
    TRIES,
    Decode,
    DecodedDevices,
    DeviceRegion,
    DeviceSection,
    goes_on,
    make_section,
    read_head,
    split_by_decoding,
    split_by_footers,
    split_devices,
)

__all__ = [
    "CANDIDATES",
    "Decode",
    "DecodedDevices",
    "DeviceRegion",
    "DeviceSection",
    "EarlyFinder",
    "Found",
    "TailFinder",
    "split_by_footers",
    "split_devices",
]

CANDIDATES: Final = 64
"""Places that look like the closing description; real streams hold one."""

# The end-of-stream byte, the description's type byte, a length within limits.DESCRIPTION, a brace.
_TAIL: Final = rb"\x00\x06(?:\x00.{3}|\x01\x00{3})\{"
_TAIL_SIZE: Final = 7

# QEMU's JSON is one line, and a string in it has no control characters.
_NOT_JSON: Final = (re.compile(rb"\x00"), re.compile(rb"\n"))


Section: TypeAlias = DeviceSection | DeviceRegion | DecodedDevices


@dataclass(frozen=True, slots=True)
class Found:
    """The device sections, whose bodies are copies, and what stands behind them.

    ``devices_size`` is the bytes of all device sections, up to the end-of-stream byte;
    ``description_size`` those of the description behind that byte, 0 where there is none.
    """

    sections: tuple[Section, ...]
    devices_size: int
    description: VmDescription | UnreadDescription | None
    description_size: int


class TailFinder:
    """Finds the end of the device sections while they come in.

    A place that looks like the end of the stream with a description behind it is a candidate.  Once
    all of its bytes are there, it is the end if the description can be read and everything before
    it splits as described.  Candidates are judged in the order in which they become complete, so
    the verdict depends on nothing but the bytes: not on the sizes of reads, nor on false candidates
    that wait for bytes that never come.

    Where the caller can *decode* the devices, that is what everything has to be true of, and the
    description is read only if it fails, for an error that says more exactly what does not fit.

    ``offset`` is the first device's place in the channel, ``early`` the number of devices that came
    before, apart from the others.
    """

    def __init__(
        self, *, footers: bool, offset: int, early: int = 0, decode: Decode | None = None
    ) -> None:
        self._footers = footers
        self._offset = offset
        self._early = early
        self._decode = decode
        self._lead = FOOTER_SIZE if footers else 0
        self._pattern = re.compile((rb"\x7e.{4}" if footers else b"") + _TAIL, re.DOTALL)
        self._scanned = 0
        self._candidates = 0
        self._pending: list[tuple[int, int]] = []
        self._rejected: tuple[int, StreamError] | None = None

    def search(self, region: bytes | memoryview, *, ended: bool) -> Found | None:
        """The end, or ``None`` while it is not there yet.

        *region* is everything received from the first device on, each time from the same byte on;
        *ended* says that no more will come.  Raises :class:`StreamError` where there is no end,
        :class:`LimitExceeded` where it is too far away or there are too many candidates.
        """
        stop = min(len(region), limits.DEVICES + self._lead + _TAIL_SIZE)
        while (match := self._pattern.search(region, self._scanned, stop)) is not None:
            if (found := self._judge(region, match.end())) is not None:
                return found
            self._note(region, match.start() + self._lead)
        self._scanned = max(self._scanned, stop - self._lead - _TAIL_SIZE + 1)
        if (found := self._judge(region, len(region))) is not None:
            return found
        if len(region) > limits.DEVICES + self._lead + _TAIL_SIZE and not self._pending:
            raise self._too_far()
        return self._finish(region) if ended else None

    def search_description(self, rest: bytes | memoryview, *, ended: bool) -> Found | None:
        """As :meth:`search` where the end-of-stream byte stood in place of a device.

        *rest* is everything behind that byte.
        """
        if not rest:
            return Found((), 0, None, 0) if ended else None
        if rest[0] != Kind.DESCRIPTION:
            raise StreamError("a description (06) or nothing behind the end", f"{rest[0]:#04x}")
        text_size = int.from_bytes(rest[1:5]) if len(rest) >= 5 else 0
        if text_size > limits.DESCRIPTION:
            raise LimitExceeded(f"at most {limits.DESCRIPTION} bytes of JSON", str(text_size))
        if len(rest) < 5 + text_size or len(rest) < 5:
            if ended:
                raise TruncatedStream("a whole description", f"{len(rest)} bytes of it")
            return None
        description = parse_description(rest[5 : 5 + text_size])
        if missing := description.devices[self._early :]:
            name = printable(missing[0].name)
            raise StreamError(f"device {name}, which is described", "no device")
        return Found((), 0, description, 5 + text_size)

    def rejection(self, size: int) -> StreamError | None:
        """Why the candidate that was complete after exactly *size* bytes is not the end.

        A source that waits for an answer sends nothing behind its description.  So if the channel
        has gone silent after *size* bytes, this is what is wrong with the stream.
        """
        if self._rejected is not None and self._rejected[0] == size:
            return self._rejected[1]
        return None

    def _note(self, region: bytes | memoryview, end: int) -> None:
        """Keep the candidate whose end-of-stream byte is at *end*."""
        self._candidates += 1
        if self._candidates > CANDIDATES:
            raise LimitExceeded(
                f"at most {CANDIDATES} places that look like the stream's end",
                "more",
                offset=self._offset + end,
            )
        size = int.from_bytes(region[end + 2 : end + 6])
        self._pending.append((end + 6 + size, end))
        self._pending.sort()
        self._scanned = end - self._lead + 1

    def _judge(self, region: bytes | memoryview, size: int) -> Found | None:
        """The first of the pending candidates that are complete after *size* bytes to hold."""
        while self._pending and self._pending[0][0] <= size:
            complete, end = self._pending.pop(0)
            text = region[end + 6 : complete]
            if text[-1:] != b"}" or _broken(text):
                continue
            try:
                sections, description = self._split(region[:end], text)
            except StreamError as error:
                self._rejected = complete, error.within(offset=self._offset + end + 1)
            else:
                return Found(sections, end, description, complete - end - 1)
        return None

    def _split(
        self, data: bytes | memoryview, text: bytes | memoryview
    ) -> tuple[tuple[Section, ...], VmDescription | UnreadDescription]:
        """The device sections in *data*, which *text* describes, and the description."""
        if (decoded := self._decoded(data)) is not None:
            return (decoded,), UnreadDescription(text)
        description = parse_description(text)
        sections = split_devices(
            data, description, footers=self._footers, offset=self._offset, early=self._early
        )
        return sections, description

    def _split_undescribed(self, data: bytes | memoryview) -> tuple[Section, ...]:
        if (decoded := self._decoded(data)) is not None:
            return (decoded,)
        if self._footers:
            return split_by_footers(data, self._offset)
        return (DeviceRegion(self._offset, bytes(data)),)

    def _decoded(self, data: bytes | memoryview) -> DecodedDevices | None:
        if self._decode is None:
            return None
        try:
            return split_by_decoding(data, self._decode, footers=self._footers, offset=self._offset)
        except StreamError:
            return None

    def _finish(self, region: bytes | memoryview) -> Found:
        if (error := self.rejection(len(region))) is not None:
            raise error
        for _complete, end in self._pending:
            if not _broken(region[end + 6 :]):
                raise TruncatedStream(
                    "a whole description",
                    f"{len(region) - end - 6} bytes of it",
                    offset=self._offset + len(region),
                )
        if len(region) > limits.DEVICES:
            raise self._too_far()
        last = bytes(region[-1 - self._lead :])
        if last[-1:] != b"\0" or (self._footers and last[0] != Kind.FOOTER):
            raise TruncatedStream(
                "the end of the stream behind the devices",
                "the end of the input",
                offset=self._offset + len(region),
            )
        size = len(region) - 1
        *_, section = sections = self._split_undescribed(region[:size])
        if section.offset + section.size != self._offset + size:
            raise StreamError(
                "devices up to the end of the stream",
                f"something else behind {printable(section.name)}",
                offset=section.offset + section.size,
            )
        return Found(sections, size, None, 0)

    def _too_far(self) -> LimitExceeded:
        most = f"at most {limits.DEVICES} bytes of devices"
        return LimitExceeded(most, "more", offset=self._offset)


class EarlyFinder:
    """Finds the end of a device section that comes before guest memory does.

    Only its footer and the head of what follows can tell: a section, or a part of one of the
    iterable sections *numbers*.  ``offset`` is the section's place in the channel.
    """

    def __init__(self, offset: int, numbers: Collection[int]) -> None:
        self._offset = offset
        self._numbers = numbers
        self._scanned = 0
        self._tries = 0

    def search(self, region: bytes | memoryview, *, ended: bool) -> DeviceSection | None:
        """The section, or ``None`` while its end is not there yet.

        *region* is everything received from the section's first byte on.
        """
        head_size = 14 + (region[5] if len(region) > 5 else 0)
        if len(region) < head_size or len(region) < 6:
            if ended:
                raise TruncatedStream("a device section", f"{len(region)} bytes of it")
            return None
        head, start = read_head(bytes(region[:head_size]), 0, self._offset)
        end = self._end(region, start, SectionFooter(head.number).encode())
        if end is not None:
            reason = "it came before its description could"
            return make_section(
                head, memoryview(bytes(region[start:end])), self._offset, True, reason
            )
        if ended:
            raise TruncatedStream("the footer of a device section", "the end of the input")
        return None

    def _end(self, region: bytes | memoryview, start: int, footer: bytes) -> int | None:
        pattern = re.compile(re.escape(footer))
        at = max(start, self._scanned)
        stop = start + limits.DEVICE_SECTION
        while (match := pattern.search(region, at, stop + FOOTER_SIZE)) is not None:
            going_on = goes_on(region, match.end(), self._numbers)
            if going_on:
                return match.start()
            if going_on is None:
                self._scanned = match.start()
                return None
            self._tries += 1
            if self._tries > TRIES:
                break
            at = match.start() + 1
        else:
            self._scanned = max(at, len(region) - FOOTER_SIZE + 1)
            if len(region) <= stop + FOOTER_SIZE:
                return None
        raise LimitExceeded(
            f"a device section of at most {limits.DEVICE_SECTION} bytes with its footer",
            "more, or too many that look like it",
            offset=self._offset,
        )


def _broken(text: bytes | memoryview) -> bool:
    return any(byte.search(text) for byte in _NOT_JSON)
