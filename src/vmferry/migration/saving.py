"""A stopped machine as a stream: iterable sections, device sections, and their description.

The saving half of QEMU 7.2 ``migration/savevm.c``.  What is written here is read by QEMU's own
``scripts/analyze-migration.py`` to the last byte: every section is described, also the iterable
ones, which QEMU does not describe (:mod:`vmferry.wire.framed`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from vmferry.errors import LimitExceeded, StateError, StreamError, UsageError, printable
from vmferry.vmstate import describe, save
from vmferry.vmstate.staging import run_hook
from vmferry.wire import limits
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import VmDescription, parse_description
from vmferry.wire.framed import Frame, frame_description
from vmferry.wire.layout import Kind
from vmferry.wire.machine import target_page_size
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionEnd,
    SectionFooter,
    SectionPart,
    SectionStart,
)

from .handlers import PieceWriter
from .registry import Device, Handler, Registry, Section


class Machine(Protocol):
    """A machine at rest.  ``name`` is its type: what is saved loads into no other."""

    @property
    def name(self) -> str:
        """The machine's type, 1 to 255 printable bytes; with its version, as ``board-1.0``."""

    @property
    def registry(self) -> Registry:
        """Its devices and handlers."""


Write = Callable[[bytes], object]


def save_stream(machine: Machine, write: Write) -> None:
    """Write the stream of a machine that does not run, piece by piece.

    Raises :class:`UsageError` before anything is written where the machine cannot be migrated, and
    :class:`StateError` where a state does not fit its declaration.
    """
    machine.registry.check_migratable()
    _Saving(machine, write).run()


class _Saving:
    def __init__(self, machine: Machine, write: Write) -> None:
        self._machine = machine
        self._write = write
        self._described: list[dict[str, Any]] = []
        self._sizes: list[int] = []

    def run(self) -> None:
        name = self._machine.name
        if not 1 <= len(name.encode()) <= limits.CONFIG_NAME or not name.isprintable():
            raise UsageError(
                f"a machine's name has 1 to {limits.CONFIG_NAME} printable bytes,"
                f" not {printable(name)}"
            )
        configuration = Configuration(name)
        self._write(Header().encode())
        self._write(configuration.encode())
        with ExitStack() as stack:
            numbers = self._save_handlers(stack)
            for number, device in enumerate(self._machine.registry.devices, numbers):
                with within(device):
                    self._save_device(number, device)
            self._write(EndOfStream().encode())
            self._write(self._description(target_page_size(configuration)).encode())

    # Handlers

    def _save_handlers(self, stack: ExitStack) -> int:
        """Write all of the iterable sections; how many there are."""
        handlers = list(enumerate(self._machine.registry.handlers))
        for number, section in handlers:
            head = SectionStart(number, section.name, section.instance, section.version)
            stack.callback(section.handler.cleanup)
            self._piece(head, section, section.handler.setup)
            fields = frame_description(section.handler.chunk)
            self._described.append(_entry(section) | _state(section, fields))
            self._sizes.append(sum(field["size"] for field in fields))
        for number, section in handlers:
            part = SectionPart(number, section.name)
            while section.handler.pending() > 0:
                if not self._piece(part, section, section.handler.iterate):
                    raise StateError("some of what is pending", "a piece without a byte").within(
                        section=section.name
                    )
        for number, section in handlers:
            self._piece(SectionEnd(number, section.name), section, section.handler.complete)
        return len(handlers)

    def _piece(self, head: _Head, section: Handler, write: Callable[[PieceWriter], None]) -> int:
        """Write one piece; how many bytes of it are the handler's."""
        piece = PieceWriter(section.handler.chunk)
        with within(section):
            run_hook(write.__name__, write, piece)
        data = piece.written()
        self._write(head.encode())
        self._write(Frame(piece.chunk, data).encode())
        self._write(SectionFooter(head.number).encode())
        return len(data)

    # Devices

    def _save_device(self, number: int, section: Device) -> None:
        body = save(section.device)
        self._described.append(_entry(section) | describe(section.device))
        self._sizes.append(len(body))
        if len(body) > limits.DEVICE_SECTION:
            raise LimitExceeded(f"a state of at most {limits.DEVICE_SECTION} bytes", str(len(body)))
        head = SectionStart(number, section.name, section.instance, section.version)
        self._write(head.encode(Kind.FULL))
        self._write(body)
        self._write(SectionFooter(number).encode())

    def _description(self, page_size: int) -> VmDescription:
        text = json.dumps({"page_size": page_size, "devices": self._described}).encode()
        # Whoever loads the stream refuses what this refuses: too much, or not as it was saved.
        description = parse_description(text)
        for device, size in zip(description.devices, self._sizes, strict=True):
            if device.size != size:
                raise StateError(
                    f"a state of {size} bytes to be described as such",
                    f"{device.size} (does it change while it is saved?)",
                ).within(section=device.name)
        return description


class _Head(Protocol):
    @property
    def number(self) -> int: ...

    def encode(self) -> bytes: ...


def _entry(section: Section) -> dict[str, Any]:
    return {"name": section.name, "instance_id": section.instance}


def _state(section: Section, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {"vmsd_name": section.name, "version": section.version, "fields": fields}


@contextmanager
def within(section: Section, offset: int | None = None) -> Iterator[None]:
    """Say of errors in which section they came up."""
    try:
        yield
    except StreamError as error:
        error.within(section=section.name, offset=offset)
        raise
