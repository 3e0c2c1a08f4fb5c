"""Iterative handlers while a stream is written: their pieces, and what describes them.

QEMU 7.2 ``migration/savevm.c`` (``qemu_savevm_state_setup`` to ``_complete_precopy``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from vmferry.errors import StateError
from vmferry.vmstate.staging import run_hook
from vmferry.wire.framed import Frame, frame_description
from vmferry.wire.sections import SectionEnd, SectionFooter, SectionPart, SectionStart

from .handlers import PieceWriter
from .registry import Handler, within

_IN_VAIN: Final = 100
"""Pieces that a handler may write with the machine stopped before less is pending: it is known
roughly only."""


class Pieces:
    """The sections of *handlers*, numbered from *first* on; *write* takes their bytes.

    Raises :class:`StateError` where a handler does not keep its promises.
    """

    def __init__(
        self, handlers: Sequence[Handler], first: int, write: Callable[[bytes], object]
    ) -> None:
        self._handlers = list(enumerate(handlers, first))
        self._write = write

    def __len__(self) -> int:
        return len(self._handlers)

    @property
    def descriptions(self) -> list[tuple[str, ...]]:
        """What describes each handler's section in the closing description."""
        return [(_describe(section),) for _, section in self._handlers]

    def setup(self, cleanup: ExitStack) -> None:
        """Begin every section; *cleanup* is told how to end what that took."""
        for number, section in self._handlers:
            head = SectionStart(number, section.name, section.instance, section.version)
            cleanup.callback(section.handler.cleanup)
            self._piece(head.encode(), number, section, section.handler.setup)

    def pending(self) -> int:
        """Bytes that are still to be written, roughly."""
        return sum(section.handler.pending() for _, section in self._handlers)

    def iterate(self) -> None:
        """Write what is pending now; what becomes so meanwhile is left for the next call."""
        for number, section in self._handlers:
            left = section.handler.pending()
            while left > 0 and section.handler.pending() > 0:
                left -= self._part(number, section)

    def complete(self) -> None:
        """Write the rest: nothing changes any more, so that ever less has to be pending."""
        for number, section in self._handlers:
            lowest, in_vain = section.handler.pending(), 0
            while (pending := section.handler.pending()) > 0:
                in_vain = 0 if pending < lowest else in_vain + 1
                lowest = min(lowest, pending)
                if in_vain > _IN_VAIN:
                    raise StateError(
                        f"less than {lowest} bytes pending after {_IN_VAIN} pieces more, as the"
                        " machine stands still",
                        str(pending),
                    ).within(section=section.name)
                self._part(number, section)
        for number, section in self._handlers:
            head = SectionEnd(number, section.name).encode()
            self._piece(head, number, section, section.handler.complete)

    def _part(self, number: int, section: Handler) -> int:
        """Write one piece of what is pending; how many bytes of it are the handler's."""
        head = SectionPart(number, section.name).encode()
        written = self._piece(head, number, section, section.handler.iterate)
        if not written:
            raise StateError("some of what is pending", "a piece without a byte").within(
                section=section.name
            )
        return written

    def _piece(
        self, head: bytes, number: int, section: Handler, write: Callable[[PieceWriter], None]
    ) -> int:
        """Write one piece; how many bytes of it are the handler's."""
        piece = PieceWriter(section.handler.chunk)
        with within(section):
            run_hook(write.__name__, write, piece)
        data = piece.written()
        self._write(head + Frame(piece.chunk, data).encode() + SectionFooter(number).encode())
        return len(data)


def _describe(section: Handler) -> str:
    fields = frame_description(section.handler.chunk)
    state = {
        "name": section.name,
        "instance_id": section.instance,
        "vmsd_name": section.name,
        "version": section.version,
        "fields": fields,
    }
    return json.dumps(state)
