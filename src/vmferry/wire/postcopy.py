"""What follows the package of a postcopy migration, and what a recovery begins with.

QEMU 7.2 ``migration/savevm.c`` and ``migration/ram.c``.  Pages come in parts of the section `ram`,
or bare on the channel of ``postcopy-preempt``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from .buffer import ChannelReader, Parse, within
from .commands import Command, Ping, PostcopyResume, ReceivedBitmap, command_name, parse_command
from .layout import RAM_SECTION, Kind
from .ram import RamBlock, RamReader
from .sections import EndOfStream, SectionEnd, SectionFooter, SectionPart

_CAPACITY: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the reader of the rest has to know of what came up to the package.

    ``section`` is the number of the section `ram`, ``footers`` whether sections end with one,
    ``current`` the block that the page before was of.
    """

    blocks: tuple[RamBlock, ...]
    page_size: int
    section: int
    footers: bool
    current: str | None


class PostcopyReader(ChannelReader[Any]):
    """Reads the main channel behind the package, up to its end.

    In a *recovery*, on a connection of its own, the source may ask what arrived
    (``ReceivedBitmap``) and says that it goes on (``PostcopyResume``); before that there is neither
    a page nor an end.  Events are those of :class:`~.reader.StreamReader`.
    """

    def __init__(self, start: Continuation, *, recovery: bool = False) -> None:
        super().__init__("main", _CAPACITY)
        self._ram = _ram(start)
        if start.current is not None and not recovery:
            self._ram.go_on_in(start.current)
        self._section = start.section
        self._footers = start.footers
        self._recovery = recovery
        self._has_ended = False

    def _parse(self) -> Parse[None]:
        at = self._at
        while True:
            kind = yield from at.peek_number(1, "a section")
            match kind:
                case Kind.PART | Kind.END | Kind.EOF if self._recovery:
                    raise at.fail(
                        "the word that postcopy goes on, before memory or the end of it",
                        f"the type byte {kind:#04x}",
                    )
                case Kind.PART | Kind.END:
                    yield from within(self._pages(kind), section=RAM_SECTION)
                case Kind.COMMAND:
                    yield from self._command()
                case Kind.EOF:
                    self.buffer.advance(1)
                    yield EndOfStream()
                    return
                case _:
                    raise at.fail(
                        "a part of guest memory, its end, a command or the end of the stream",
                        f"the type byte {kind:#04x}",
                    )

    def _pages(self, kind: int) -> Parse[None]:
        at = self._at
        yield from at.need(5, "a section's head")
        number = int.from_bytes(at.buffer.peek(5)[1:])
        if number != self._section or self._has_ended:
            raise at.fail(f"section {self._section}, which has not ended", str(number))
        at.buffer.advance(5)
        self._has_ended = kind == Kind.END
        part = SectionEnd if self._has_ended else SectionPart
        yield part(number, RAM_SECTION)
        yield from self._ram.body(at)
        if self._footers:
            footer = SectionFooter(number)
            yield from at.need(5, "a section's footer")
            found = bytes(at.buffer.peek(5))
            if found != footer.encode():
                raise at.fail(f"the footer {footer.encode().hex(' ')}", found.hex(" "))
            at.buffer.advance(5)
            yield footer

    def _command(self) -> Parse[None]:
        offset = self.buffer.offset
        command: Command = yield from parse_command(self._at)
        match command:
            case Ping():
                pass
            case ReceivedBitmap() if self._recovery:
                pass
            case PostcopyResume() if self._recovery:
                self._recovery = False
            case _:
                raise self._at.fail(
                    "a ping, or in a recovery a question for what arrived",
                    command_name(command.number),
                    offset=offset,
                )
        yield command


class UrgentReader(ChannelReader[Any]):
    """Reads the channel of ``postcopy-preempt``: batches of pages, up to its end."""

    def __init__(self, start: Continuation) -> None:
        super().__init__("preempt", _CAPACITY)
        self._ram = _ram(start)

    def _parse(self) -> Parse[None]:
        # Since QEMU 8.0 it is only closed.
        if (yield from self._at.more()):
            yield from within(self._ram.body(self._at), section=RAM_SECTION)


def _ram(start: Continuation) -> RamReader:
    blocks = {block.name: block for block in start.blocks}
    return RamReader(start.page_size, 0, blocks=blocks, postcopy=True)
