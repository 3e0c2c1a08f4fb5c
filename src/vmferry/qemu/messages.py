"""QMP's messages: JSON objects in a stream of bytes, found, bounded, read and written.

As in QEMU (``qobject/json-streamer.c``) an object ends where its last brace is, not where a line
does: some clients send neither line ends nor one object a line.  A line end outside of an object
ends what is none.  The other side can send anything; it gets no further than an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from vmferry.errors import PeerError, printable

Object = dict[str, Any]

_DEPTH: Final = 1024  # as deep as QEMU goes
_MARK: Final = re.compile(rb'["\\{}\[\]\n]')
_QUOTE, _ESCAPE, _NEWLINE = b'"\\\n'


class Splitter:
    """Finds the messages in what arrives; each has at most *limit* bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._start_over()

    def _start_over(self) -> None:
        self._searched = 0
        self._depth = 0
        self._is_text = False
        self._escaped = -1

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take *data* in; yields the messages that are complete now, as they came.

        Raises PeerError for one that is too long, after which there is nothing more to be read.
        """
        self._buffer += data
        while (end := self._end()) is not None:
            if end > self._limit:
                break
            message = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._start_over()
            if not message.isspace():
                yield message
        if len(self._buffer) > self._limit:
            raise PeerError(
                f"expected a QMP message of at most {self._limit} bytes, found a longer one"
            )

    def _end(self) -> int | None:
        """Where the first message in the buffer ends, if it does."""
        for mark in _MARK.finditer(self._buffer, self._searched):
            at = mark.start()
            if self._is_last(at, self._buffer[at]):
                return at + 1
        self._searched = len(self._buffer)
        return None

    def _is_last(self, at: int, byte: int) -> bool:
        if byte == _NEWLINE:
            # In a text JSON has none: whatever this is, it ends here.
            return self._is_text or not self._depth
        if self._is_text:
            if byte == _ESCAPE and at != self._escaped:
                self._escaped = at + 1
            elif byte == _QUOTE and at != self._escaped:
                self._is_text = False
        elif byte == _QUOTE:
            self._is_text = True
        elif byte in b"{[":
            self._depth += 1
            return self._depth > _DEPTH
        elif byte in b"}]":
            self._depth -= 1
            return self._depth <= 0
        return False


def read_message(text: bytes) -> Object:
    """The message in *text*.  Raises PeerError where there is none."""
    try:
        message = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as exc:
        raise PeerError(f"expected a QMP message in JSON, found {printable(text.strip())}") from exc
    if not isinstance(message, dict):
        raise PeerError(f"expected a QMP message, found {printable(text.strip())}")
    return message


def write_message(message: Object) -> bytes:
    """*message* as it is sent: a line of ASCII."""
    return json.dumps(message).encode() + b"\r\n"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
