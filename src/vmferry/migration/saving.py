"""A stopped machine as a stream: iterable sections, device sections, and their description.

The saving half of QEMU 7.2 ``migration/savevm.c``.  What is written here is read by QEMU's own
``scripts/analyze-migration.py`` to the last byte: every section is described, also the iterable
ones, which QEMU does not describe (:mod:`vmferry.wire.framed`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from typing import Final, Protocol, TypeAlias

from vmferry.errors import LimitExceeded, StreamError, UsageError, printable
from vmferry.vmstate.transfer import save_described
from vmferry.wire import limits
from vmferry.wire.configuration import Configuration
from vmferry.wire.description import UnreadDescription, parse_description
from vmferry.wire.layout import Kind
from vmferry.wire.machine import target_page_size
from vmferry.wire.sections import (
    EndOfStream,
    Header,
    SectionFooter,
    SectionStart,
)

from .pieces import Pieces
from .registry import Registry, Section


class Machine(Protocol):
    """A machine at rest.  ``name`` is its type: what is saved loads into no other."""

    @property
    def name(self) -> str:
        """The machine's type, 1 to 255 printable bytes; with its version, as ``board-1.0``."""

    @property
    def registry(self) -> Registry:
        """Its devices and handlers."""


_SURELY_READABLE: Final = 4 * limits.JSON_TOKENS
"""Bytes of a description that cannot have more tokens than readers allow: a field has 8 in 40."""

Write = Callable[[bytes], object]


def save_stream(machine: Machine, write: Write) -> None:
    """Write the stream of a machine that does not run, piece by piece.

    Raises :class:`UsageError` before anything is written where the machine cannot be migrated, and
    :class:`StateError` where a state does not fit its declaration.
    """
    machine.registry.check_migratable()
    _Saving(machine, write).run()


Description: TypeAlias = tuple[str, ...]
"""What describes a section: JSON in pieces, as there may be much of it, most of it alike."""


def device_sections(registry: Registry, first: int) -> Iterator[tuple[bytes, Description]]:
    """Each device's section, whole, and what describes it; numbered from *first* on.

    The devices do not run meanwhile.  Raises :class:`StateError` where a state does not fit its
    declaration.
    """
    total = 0
    for number, section in enumerate(registry.devices, first):
        head = SectionStart(number, section.name, section.instance, section.version)
        before, behind = head.encode(Kind.FULL), SectionFooter(number).encode()
        try:
            data, members = save_described(section.device, before=before, behind=behind)
            _check_size("a state", len(data) - len(before) - len(behind), limits.DEVICE_SECTION)
        except StreamError as error:
            raise error.within(section=section.name) from error.__cause__
        total += len(data)
        _check_size("states", total, limits.DEVICES)
        yield data, (_identity(section), members, "}")


def closing_description(page_size: int, descriptions: Sequence[Description]) -> bytes:
    """What stands behind the end of a stream whose sections have *descriptions*."""
    whole = BytesIO()
    whole.write(UnreadDescription(b"").encode())
    head = whole.tell()
    whole.write(f'{{"page_size": {page_size}, "devices": ['.encode())
    for index, description in enumerate(descriptions):
        for piece in (", " if index else "", *description):
            whole.write(piece.encode())
    whole.write(b"]}")
    size = whole.tell() - head
    if size > _SURELY_READABLE or len(descriptions) > limits.DEVICE_COUNT:
        parse_description(whole.getvalue()[head:])  # Whoever reads it refuses what this refuses.
    whole.seek(head - 4)
    whole.write(size.to_bytes(4))
    return whole.getvalue()


class _Saving:
    def __init__(self, machine: Machine, write: Write) -> None:
        self._machine = machine
        self._write = write

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
        registry = self._machine.registry
        pieces = Pieces(registry.handlers, 0, self._write)
        descriptions = pieces.descriptions
        with ExitStack() as cleanup:
            pieces.setup(cleanup)
            pieces.complete()
            for section, description in device_sections(registry, len(pieces)):
                self._write(section)
                descriptions.append(description)
            self._write(EndOfStream().encode())
            self._write(closing_description(target_page_size(configuration), descriptions))


def _check_size(what: str, size: int, limit: int) -> None:
    if size > limit:
        raise LimitExceeded(f"{what} of at most {limit} bytes", str(size))


def _identity(section: Section) -> str:
    """The beginning of what describes a section."""
    return f'{{"name": {json.dumps(section.name)}, "instance_id": {section.instance}, '
