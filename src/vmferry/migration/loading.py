"""A stream into a stopped machine: everything is decoded before anything is changed.

The loading half of QEMU 7.2 ``migration/savevm.c``.  Where a device's state ends is what its own
declaration says; a description that holds for the stream has to agree, and so have the footers.
Unlike QEMU, which also takes half a machine, this refuses a stream that lacks the state of a
device, or has it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from vmferry.errors import StateError, StreamError, printable
from vmferry.vmstate import Staged, stage
from vmferry.vmstate.staging import run_hook
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import UnreadDescription, VmDescription
from vmferry.wire.devices import Decode, DecodedDevices, DeviceRegion, DeviceSection
from vmferry.wire.framed import Frame
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)
from vmferry.wire.split import read_head

from .handlers import PieceReader
from .registry import Device, Handler, Registry, Section, within
from .saving import Machine

S = TypeVar("S", bound=Section)

Events = Iterator[tuple[Any, int]]
"""What a reader makes of a stream, each with the offset behind it in the channel."""

_PARTLY: Final = "the machine is loaded in part: do not run it"


def load_stream(
    machine: Machine, events: Callable[[Decode], Events], *, may_lack: Collection[str] = ()
) -> None:
    """Load the stream that *events* gives from the beginning, each time that it is called.

    What it is called with is for the reader of the stream.  It is read twice where the machine has
    iterative handlers: to see whether all of it fits, and to load them.  The names in *may_lack*
    are those of sections that need not be there.  Raises :class:`StreamError`, with the machine as
    it was unless it says otherwise.
    """
    check = _Check(machine)
    for event, end in events(check.staging.decode):
        check.take(event, end)
    check.finish(may_lack)
    if check.handlers:
        _load_handlers(check.handlers, events(check.staging.decode))
    check.staging.commit()


@dataclass(slots=True)
class _Region:
    """Device sections one behind the other; ``ends`` are the described ends of bodies."""

    offset: int
    footers: bool
    size: int = 0
    parts: list[bytes] = field(default_factory=list)
    ends: dict[int, int] = field(default_factory=dict)


class Staging:
    """What a stream has for the sections of registries, decoded before anything is changed.

    Events of the stream are given to :meth:`start` and :meth:`take` in their order; :meth:`finish`
    says whether all of it fits, and :meth:`commit` assigns it.  All raise :class:`StreamError`,
    and only :meth:`commit` changes anything.  A reader that is given :meth:`decode` need not read
    the stream's description to tell devices apart, which takes most of the time otherwise.
    """

    def __init__(self, *registries: Registry) -> None:
        self._registries = registries
        self._seen: set[Section] = set()
        self._parts: list[_Region | DecodedDevices] = []
        self._staged: list[tuple[Device, Staged]] = []

    def start(self, head: SectionStart, offset: int | None) -> Handler:
        """The handler of an iterative section that begins at *offset*."""
        section = self._find(head, offset, Handler)
        self._note(section, offset)
        _check_version(section, head.version, offset)
        return section

    def decode(
        self, head: SectionStart, data: memoryview, offset: int
    ) -> tuple[int, tuple[Device, Staged]]:
        """Decode the state that *data* begins with, which must not change before the end of all.

        For :class:`~vmferry.wire.reader.StreamReader`, whose events then hold what this returns.
        """
        device = self._find(head, offset, Device)
        try:
            state = stage(device.device, data, head.version)
        except StreamError as error:
            raise error.within(section=device.name, offset=offset) from error.__cause__
        return state.size, (device, state)

    def take(self, section: DeviceSection | DeviceRegion | DecodedDevices) -> None:
        """Take note of the state of devices."""
        if isinstance(section, DecodedDevices):
            self._parts.append(section)
            return
        footers = isinstance(section, DeviceSection) and section.footer
        region = self._parts[-1] if self._parts else None
        if not isinstance(region, _Region) or region.offset + region.size != section.offset:
            region = _Region(section.offset, footers)
            self._parts.append(region)
        if isinstance(section, DeviceSection) and section.described:
            start = region.size + len(section.head)
            region.ends[start] = start + len(section.body)
        region.parts.append(section.encode())
        region.size += section.size

    def finish(self, may_lack: Collection[str] = ()) -> None:
        """Decode the devices; only sections named in *may_lack* may be without a state."""
        for part in self._parts:
            if isinstance(part, DecodedDevices):
                for device, state in part.states:
                    self._note(device, part.offset)
                    self._staged.append((device, state))
            else:
                self._staged += self._decode(part)
        lacking = [
            str(section)
            for registry in self._registries
            for section in (*registry.handlers, *registry.devices)
            if section not in self._seen and section.name not in may_lack
        ]
        if lacking:
            raise StreamError(
                "the state of every device",
                f"nothing of {', '.join(lacking)}",
                advice="allow by name those that may keep the state they have (may_lack)",
            )

    def commit(self) -> None:
        """Assign the states in the order of the stream, each before its ``post_load`` is called.

        Where one fails, those behind it are as they were, and the error says so.
        """
        for section, state in self._staged:
            try:
                state.commit()
            except StreamError as error:
                error.advice = _PARTLY
                raise error.within(section=section.name) from error.__cause__
            except Exception as error:
                error.add_note(f"{section}: {_PARTLY}")
                raise

    def _decode(self, region: _Region) -> Iterator[tuple[Device, Staged]]:
        raw = b"".join(region.parts)
        at = 0
        while at < len(raw):
            head, start = read_head(raw, at, region.offset)
            device = self._find(head, region.offset + at, Device)
            self._note(device, region.offset + at)
            end = region.ends.get(start)
            with within(device, region.offset + start):
                state = stage(device.device, memoryview(raw)[start:end], head.version)
            at = start + state.size
            with within(device, region.offset + at):
                if end not in (None, at):
                    raise StateError(
                        f"the end of the state after {state.size} bytes",
                        f"{end - at} more, as the stream describes it",
                    )
                footer = SectionFooter(head.number).encode() if region.footers else b""
                if not raw.startswith(footer, at):
                    found = raw[at : at + len(footer)].hex(" ")
                    raise StateError(f"the footer {footer.hex(' ')} behind the state", found)
            at += len(footer)
            yield device, state

    def _find(self, head: SectionStart, offset: int | None, kind: type[S]) -> S:
        """What the machine has of *kind* under the section's name."""
        found = (registry.find(head.name, head.instance) for registry in self._registries)
        section = next((one for one in found if one is not None), None)
        if section is None:
            numbers = [n for registry in self._registries for n in registry.instances(head.name)]
            instances = ", ".join(map(str, numbers))
            raise StreamError(
                "a section that this machine has",
                f"{printable(head.name)} instance {head.instance}",
                section=head.name,
                offset=offset,
                advice=f"of that name it has instance {instances}" if instances else None,
            )
        if not isinstance(section, kind):
            raise StreamError(
                f"the section of a {type(section).__name__.lower()}",
                f"that of a {kind.__name__.lower()}",
                section=head.name,
                offset=offset,
            )
        return section

    def _note(self, section: Section, offset: int | None) -> None:
        """Take note that the stream has the section; each only once."""
        if section in self._seen:
            raise StreamError(f"{section} once", "it again", section=section.name, offset=offset)
        self._seen.add(section)


class _Check:
    """Goes through a stream once, and changes nothing."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._configured = False
        self.staging = Staging(machine.registry)
        self.handlers: dict[int, Handler] = {}

    def take(self, event: Any, end: int) -> None:
        """Take note of one event, which ends at *end*."""
        match event:
            case Configuration():
                self._configure(event, end)
            case SectionStart():
                self.handlers[event.number] = self.staging.start(event, end - len(event.encode()))
            case DeviceSection() | DeviceRegion() | DecodedDevices():
                self.staging.take(event)
            case Header() | SectionPart() | SectionEnd() | SectionFooter() | Frame():
                pass
            case EndOfStream() | VmDescription() | UnreadDescription():
                pass
            case _:
                raise StreamError(
                    "the state of a machine at rest", type(event).__name__, offset=end
                )

    def finish(self, may_lack: Collection[str]) -> None:
        """Decode the devices."""
        if not self._configured:
            raise StreamError(f"the name of the machine {self._machine.name}", "none")
        self.staging.finish(may_lack)

    def _configure(self, found: Configuration, end: int) -> None:
        self._configured = True
        offset = end - len(found.encode())
        if found.machine != self._machine.name:
            raise StreamError(
                f"a machine {printable(self._machine.name)}",
                printable(found.machine),
                offset=offset,
            )
        for what, value in (("capabilities", found.capabilities), ("uuid", found.uuid)):
            if value:
                raise StreamError(f"no {what} in the configuration", str(value), offset=offset)


def _load_handlers(handlers: dict[int, Handler], events: Events) -> None:
    """Give every piece to its handler; *events* are taken up to the last of them."""
    versions: dict[int, int] = {}
    left = set(handlers)
    number = 0
    for event, end in events:
        match event:
            case SectionStart():
                versions[event.number] = event.version
                number = event.number
            case SectionPart():
                number = event.number
            case SectionEnd():
                number = event.number
                left.discard(number)
            case Frame():
                load_piece(handlers[number], event, versions[number], end - len(event.encode()))


def load_piece(section: Handler, frame: Frame, version: int, offset: int | None = None) -> None:
    """Give a piece to its handler; the machine is changed, also where that fails."""
    piece = PieceReader(frame.data)
    with _partly(), within(section, offset):
        run_hook("load", section.handler.load, piece, version)
        if len(piece):
            raise StateError(
                f"{section} to take all {len(frame.data)} bytes of a piece", f"{len(piece)} left"
            )


def _check_version(section: Section, version: int, offset: int | None) -> None:
    if version > section.version:
        with within(section, offset):
            raise StateError(f"version {section.version} of {section}, or an older", str(version))


@contextmanager
def _partly() -> Iterator[None]:
    """Say of errors that the machine is not as it was."""
    try:
        yield
    except StreamError as error:
        error.advice = _PARTLY
        raise
