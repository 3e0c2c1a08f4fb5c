"""The reader of the main channel: bytes in, events out.

QEMU 7.2 ``migration/savevm.c`` (``qemu_loadvm_state_main``).  Does no I/O, never blocks, raises
nothing but :class:`~vmferry.errors.StreamError`, and does the same for the same bytes however they
were cut into reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any, Final, TypeAlias

from vmferry.errors import LimitExceeded, StreamError, UsageError, printable

from . import foreign, limits
from .bitmap import BitmapReader
from .buffer import CAPACITY, ChannelReader, Cursor, Parse, within
from .commands import (
    Command,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
    command_name,
    parse_command,
)
from .configuration import Configuration, parse_configuration
from .description import UnreadDescription, VmDescription
from .devices import Decode, DeviceRegion, DeviceSection, EarlyFinder, TailFinder
from .disk import DiskReader
from .framed import FrameReader, begins_frame
from .layout import BITMAP_SECTION, DISK_SECTION, IGNORE_SHARED, MAPPED_RAM, RAM_SECTION, Kind
from .machine import target_page_size
from .postcopy import Continuation
from .ram import RamReader
from .sections import (
    EndOfStream,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
    parse_header,
    parse_start,
)
from .split import DecodedDevices

Event = Any
Body = Callable[[Cursor], Parse[None]]
_Devices: TypeAlias = DeviceSection | DeviceRegion | DecodedDevices

VERSIONS: Final = {
    RAM_SECTION: 4,
    DISK_SECTION: 1,
    BITMAP_SECTION: 1,
    foreign.S390_ATTRIBUTES: 0,
    foreign.SPAPR_HTAB: 1,
}
"""The iterable sections that can be read, and the version of each."""


class Tolerate(Flag):
    """What is refused unless asked for, because no source that means well leaves it out."""

    NOTHING = 0
    NO_RAM = auto()
    """The stream ends before any guest memory."""
    NO_END = auto()
    """A section is never ended, as `ram` in a background snapshot."""


@dataclass(slots=True)
class _Iterable:
    head: SectionStart
    body: Body
    later: Body
    parts: int = 0
    ended: bool = False


def physical_memory() -> int:
    """Bytes of memory that this machine has: the default bound for a guest's RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class StreamReader(ChannelReader[Event]):
    """Reads one migration stream.

    ``page_size`` is the target page in bytes where neither the stream nor the machine's name tells.
    ``framed`` says that the caller takes iterable sections that machines in Python have of their
    own (:mod:`.framed`), which are refused otherwise.  A caller that knows every device gives what
    can *decode* them: then :class:`~.split.DecodedDevices` come in place of device sections, and
    the description behind them is not read.
    """

    def __init__(
        self,
        *,
        channel: str = "main",
        max_ram: int | None = None,
        page_size: int | None = None,
        tolerate: Tolerate = Tolerate.NOTHING,
        framed: bool = False,
        decode: Decode | None = None,
        capacity: int = CAPACITY,
    ) -> None:
        super().__init__(channel, capacity)
        if page_size is not None and (
            page_size & (page_size - 1) or not 1024 <= page_size <= 65536
        ):
            raise UsageError(f"a page has 1024 to 65536 bytes, a power of two; not {page_size}")
        self.configuration: Configuration | None = None
        self.description: VmDescription | None = None
        self.footers: bool | None = None
        self.return_path = False
        self.postcopy = False
        self._max_ram = physical_memory() if max_ram is None else max_ram
        self._page_size = page_size
        self._tolerate = tolerate
        self._framed = framed
        self._decode = decode
        self._advised: PostcopyAdvise | None = None
        self._ram: RamReader | None = None
        self._sections: dict[int, _Iterable] = {}
        self._devices_seen: set[tuple[str, int]] = set()
        self._described_before = 0
        self._early_size = 0
        self._tail: TailFinder | None = None

    @property
    def page_size(self) -> int:
        """Bytes of a target page, as far as is known by now."""
        if self._ram is not None:
            return self._ram.page_size
        return self._page_size or target_page_size(self.configuration)

    def continuation(self) -> Continuation:
        """What a reader of the rest has to know, behind the package of a postcopy migration.

        Raises :class:`StreamError` where an iterable section but `ram` is not at its end.
        """
        ram = self._ram
        section = None
        for number, one in self._sections.items():
            if one.head.name == RAM_SECTION:
                section = number
            elif not one.ended:
                raise StreamError(
                    "the end of every section but ram before the package",
                    "none",
                    section=one.head.name,
                )
        if ram is None or section is None or not ram.blocks:
            raise StreamError("guest memory before the package", "none")
        return Continuation(
            tuple(ram.blocks.values()), ram.page_size, section, bool(self.footers), ram.current
        )

    @property
    def suspicion(self) -> StreamError | None:
        """What is wrong with the stream, should no byte follow those received so far.

        A source that waits for an answer sends nothing behind its description; where that one does
        not fit the devices, silence is what tells.
        """
        return self._tail.rejection(len(self.buffer)) if self._tail is not None else None

    def _parse(self) -> Parse[None]:
        at = self._at
        yield (yield from parse_header(at))
        if (yield from at.peek_number(1, "a section")) == Kind.CONFIGURATION:
            yield from self._configure()
        while True:
            kind = yield from at.peek_number(1, "a section")
            match kind:
                case Kind.START | Kind.FULL if self.postcopy:
                    raise at.fail("no new section in postcopy", f"the type byte {kind:#04x}")
                case Kind.START:
                    yield from self._start()
                case Kind.PART | Kind.END:
                    yield from self._continue(kind)
                case Kind.COMMAND:
                    yield from self._command()
                case Kind.FULL if self._early():
                    yield from self._early_section()
                case Kind.FULL:
                    return (yield from self._devices())
                case Kind.EOF:
                    return (yield from self._end_without_devices())
                case _:
                    raise at.fail(
                        "a section: start, part, end, full, command or end of stream",
                        f"the type byte {kind:#04x}",
                    )

    def _configure(self) -> Parse[None]:
        offset = self.buffer.offset
        self.configuration = yield from parse_configuration(self._at)
        if MAPPED_RAM in self.configuration.capabilities:
            raise self._at.fail(
                "a stream",
                "a file with the pages at fixed places",
                offset=offset,
                advice="save it without the capability mapped-ram",
            )
        yield self.configuration

    # Iterable sections

    def _start(self) -> Parse[None]:
        offset = self.buffer.offset
        self.buffer.advance(1)
        head = yield from parse_start(self._at)
        if head.name in VERSIONS or not (self._framed and (yield from begins_frame(self._at))):
            self._check_known(head, offset)
        else:
            self._described_before += 1
        identity = (head.name, head.instance)
        if any((s.head.name, s.head.instance) == identity for s in self._sections.values()):
            raise self._at.fail(f"one section {head.name}", "a second one", offset=offset)
        if head.number in self._sections:
            raise self._at.fail(
                "a section number not in use", f"number {head.number} again", offset=offset
            )
        if len(self._sections) == limits.ITERABLES:
            raise LimitExceeded(
                f"at most {limits.ITERABLES} iterable sections", "more", offset=offset
            )
        section = _Iterable(head, *self._bodies(head.name))
        self._sections[head.number] = section
        yield head
        yield from self._body(section, section.body)

    def _check_known(self, head: SectionStart, offset: int) -> None:
        wanted = VERSIONS.get(head.name)
        if wanted is None:
            raise self._at.fail(
                f"an iterable section that can be read ({', '.join(VERSIONS)})",
                printable(head.name),
                offset=offset,
                advice="its pieces have no length, so nothing behind it can be read",
            )
        if head.version != wanted:
            raise self._at.fail(
                f"version {wanted} of section {head.name}", str(head.version), offset=offset
            )
        if head.instance != 0:
            raise self._at.fail(
                f"instance 0 of section {head.name}", str(head.instance), offset=offset
            )

    def _bodies(self, name: str) -> tuple[Body, Body]:
        if name == RAM_SECTION:
            capabilities = self.configuration.capabilities if self.configuration else ()
            sizes = self._advised.page_sizes if self._advised else None
            self._ram = RamReader(
                self.page_size,
                self._max_ram,
                addresses=IGNORE_SHARED in capabilities,
                huge_pages=sizes is not None and sizes & (sizes - 1) != 0,
            )
            return self._ram.body, self._ram.body
        if name == DISK_SECTION:
            return (body := DiskReader().body), body
        if name == BITMAP_SECTION:
            return (body := BitmapReader().body), body
        if name == foreign.S390_ATTRIBUTES:
            return foreign.storage_attributes, foreign.storage_attributes
        if name == foreign.SPAPR_HTAB:
            return foreign.hash_table_start, foreign.hash_table
        return (body := FrameReader().body), body

    def _continue(self, kind: int) -> Parse[None]:
        offset = self.buffer.offset
        yield from self._at.need(5, "a section's head")
        number = int.from_bytes(self.buffer.peek(5)[1:])
        section = self._sections.get(number)
        if section is None:
            raise self._at.fail(
                "the number of a section that was started", str(number), offset=offset
            )
        name = section.head.name
        if section.ended:
            raise self._at.fail(
                f"nothing more of section {name} after its end", "more of it", offset=offset
            )
        self.buffer.advance(5)
        section.parts += 1
        section.ended = kind == Kind.END
        yield SectionEnd(number, name) if section.ended else SectionPart(number, name)
        yield from self._body(section, section.later)

    def _body(self, section: _Iterable, body: Body) -> Parse[None]:
        yield from within(body(self._at), section=section.head.name)
        yield from within(self._footer(section.head.number), section=section.head.name)

    def _footer(self, number: int) -> Parse[None]:
        # The first section shows whether there are footers: their type byte is nothing else's.
        kind = yield from self._at.peek_number(1, "a section's footer")
        if self.footers is None:
            self.footers = kind == Kind.FOOTER
        if not self.footers:
            return
        yield from self._at.need(5, "a section's footer")
        found = bytes(self.buffer.peek(5))
        footer = SectionFooter(number)
        if found != footer.encode():
            raise self._at.fail(f"the footer {footer.encode().hex(' ')}", found.hex(" "))
        self.buffer.advance(5)
        yield footer

    # Commands

    def _command(self) -> Parse[None]:
        offset = self.buffer.offset
        command = yield from parse_command(self._at)
        if (rule := self._broken_rule(command)) is not None:
            raise self._at.fail(rule, command_name(command.number), offset=offset)
        match command:
            case OpenReturnPath():
                self.return_path = True
            case PostcopyAdvise():
                self._check_page_size(command.target_page, offset)
                self._advised = command
            case RamDiscard():
                self._check_discard(command, offset)
            case Package():
                self.postcopy = True
                if self._ram is not None:
                    self._ram.postcopy = True
        yield command

    def _broken_rule(self, command: Command) -> str | None:
        """The rule that *command* breaks where it stands, if it does."""
        match command:
            case Ping() if not self.return_path:
                return "a ping only behind the opening of a return path"
            case PostcopyAdvise() if self._ram is not None or self._advised is not None:
                return "postcopy announced once, before guest memory"
            case PostcopyListen() | PostcopyRun():
                return "this command inside a package"
            case RamDiscard() | Package() if self._advised is None or self.postcopy:
                return "postcopy announced, and begun once"
            case PostcopyResume() | ReceivedBitmap():
                return "this command in the recovery of a postcopy alone"
        return None

    def _check_discard(self, discard: RamDiscard, offset: int) -> None:
        block = self._ram.blocks.get(discard.block) if self._ram is not None else None
        if block is None:
            raise self._at.fail(
                "the name of a RAM block from the list before",
                printable(discard.block),
                offset=offset,
            )
        for start, length in discard.ranges:
            odd = (start | length) % self.page_size
            if odd or start > block.length or length > block.length - start:
                raise self._at.fail(
                    f"ranges of whole pages up to {block.length:#x}",
                    f"{start:#x}+{length:#x}",
                    offset=offset,
                    block=block.name,
                )

    def _check_page_size(self, told: int | None, offset: int) -> None:
        if told not in (None, self.page_size):
            raise self._at.fail(
                f"target pages of {self.page_size} bytes",
                str(told),
                offset=offset,
                advice=f"read it with page_size={told} (--page-size)",
            )

    # Devices and the end

    def _early(self) -> bool:
        # Devices with early state (QEMU 8.0) come between the starts and the first part; every
        # other device comes when the iterable sections have had at least a part.
        running = self._sections.values()
        return bool(running) and not any(section.parts for section in running)

    def _early_section(self) -> Parse[None]:
        finder = EarlyFinder(self.buffer.offset, self._sections.keys())
        section = None
        while section is None:
            section = finder.search(self.buffer.view(), ended=self.buffer.ended)
            if section is None:
                yield None
        self.buffer.advance(section.size)
        self._described_before += 1
        self._early_size += section.size
        if self._described_before > limits.DEVICE_COUNT or self._early_size > limits.DEVICES:
            most = f"at most {limits.DEVICE_COUNT} devices and {limits.DEVICES} bytes of them"
            raise LimitExceeded(most, "more", offset=section.offset)
        yield self._once(section)

    def _devices(self) -> Parse[None]:
        self._check_complete()
        self._tail = finder = self._tail_finder()
        found = None
        while found is None:
            found = finder.search(self.buffer.view(), ended=self.buffer.ended)
            if found is None:
                yield None
        self._tail = None
        yield from map(self._once, found.sections)
        self.buffer.advance(found.devices_size + 1)
        yield EndOfStream()
        if found.description is not None:
            yield from self._describe(found.description, found.description_size)

    def _once(self, section: _Devices) -> _Devices:
        """*section*, if its device has not had one before."""
        if isinstance(section, DeviceSection):
            identity = section.name, section.instance
            if identity in self._devices_seen:
                raise self._at.fail(
                    "each device once",
                    f"instance {section.instance} again",
                    offset=section.offset,
                    section=section.name,
                )
            self._devices_seen.add(identity)
        return section

    def _tail_finder(self) -> TailFinder:
        # Footers and the configuration came with the same machine types.
        footers = self.configuration is not None if self.footers is None else self.footers
        return TailFinder(
            footers=footers,
            offset=self.buffer.offset,
            early=self._described_before,
            decode=self._decode,
        )

    def _describe(self, description: VmDescription | UnreadDescription, size: int) -> Parse[None]:
        if isinstance(description, VmDescription):
            self._check_page_size(description.page_size, self.buffer.offset)
            self.description = description
        self.buffer.advance(size)
        yield description

    def _end_without_devices(self) -> Parse[None]:
        self._check_complete()
        self.buffer.advance(1)
        yield EndOfStream()
        if not self.postcopy:
            yield from self._description_alone()

    def _description_alone(self) -> Parse[None]:
        """What may stand behind the end where no device was sent."""
        finder = self._tail_finder()
        found = None
        while found is None:
            found = finder.search_description(self.buffer.view(), ended=self.buffer.ended)
            if found is None:
                yield None
        if found.description is not None:
            yield from self._describe(found.description, found.description_size)

    def _check_complete(self) -> None:
        has_ram = self._ram is not None and self._ram.blocks
        if not has_ram and Tolerate.NO_RAM not in self._tolerate:
            raise self._at.fail(
                "guest memory before the devices and the end",
                "none",
                advice="accept such a stream with no-ram",
            )
        for section in self._sections.values():
            if not section.ended and Tolerate.NO_END not in self._tolerate:
                raise self._at.fail(
                    f"the end of section {section.head.name}",
                    "what follows the iterable sections",
                    advice="a background snapshot has none: accept it with no-end",
                )
