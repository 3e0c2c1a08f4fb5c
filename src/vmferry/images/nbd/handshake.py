"""The handshake: from the greeting to an export that takes requests."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from vmferry.errors import printable

from .messages import (
    ALLOCATION,
    CLIENT_FLAGS,
    DEPTH,
    FIXED_NEWSTYLE,
    GREETING,
    INIT_MAGIC,
    NO_ZEROES,
    OPTION,
    OPTION_ERROR,
    OPTION_ERRORS,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Export,
    Info,
    Option,
    OptionReply,
)
from .wire import Wire

_MAX_REPLY: Final = 16384
"""Bytes of a reply to an option: a text has at most 4096."""
_MAX_REPLIES: Final = 64
"""Replies to one option: an INFO for each kind, of which there are a handful."""
_MAX_SIZE: Final = (1 << 63) - 1
_MAX_BLOCK: Final = 1 << 16
"""The largest minimum block size that the protocol allows."""
MAX_REQUEST: Final = 32 << 20
"""The longest read or write that every server takes if it says nothing."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed.  *block* is what requests have to be multiples of, *most* their limit."""

    size: int = -1
    flags: Export = Export.HAS_FLAGS
    block: int = 1
    most: int = MAX_REQUEST
    structured: bool = False
    contexts: Mapping[bytes, int] = field(default_factory=dict)
    """The numbers in block status of those contexts that the server has."""


def negotiate(wire: Wire, export: str) -> Terms:
    """Agree with the server on *export*; requests can follow."""
    _greet(wire)
    structured = _ask(wire, Option.STRUCTURED_REPLY, b"")
    terms = Terms(structured=structured)
    name = export.encode()
    if structured:
        terms = replace(terms, contexts=_contexts(wire, name))
    return _go(wire, name, terms)


def _greet(wire: Wire) -> None:
    magic, option, flags = GREETING.unpack(wire.receive(GREETING.size))
    if magic != INIT_MAGIC:
        wire.refuse("the greeting of NBD", printable(magic))
    if option != OPTION_MAGIC or not flags & FIXED_NEWSTYLE:
        wire.refuse("the fixed newstyle handshake", "an older one")
    wire.send([memoryview(CLIENT_FLAGS.pack(FIXED_NEWSTYLE | flags & NO_ZEROES))])


def _ask(wire: Wire, option: Option, data: bytes) -> bool:
    """Whether the server has an option that answers with yes or no."""
    _send(wire, option, data)
    kind, _ = _reply(wire, option)
    if kind & OPTION_ERROR:
        return False
    if kind != OptionReply.ACK:
        wire.refuse(f"an answer to {option.name}", f"one of type {kind}")
    return True


def _contexts(wire: Wire, name: bytes) -> dict[bytes, int]:
    asked = (ALLOCATION, DEPTH)
    queries = b"".join(len(one).to_bytes(4) + one for one in asked)
    head = struct.pack(f">I{len(name)}sI", len(name), name, len(asked))
    _send(wire, Option.SET_META_CONTEXT, head + queries)
    found: dict[bytes, int] = {}
    for kind, data in _replies(wire, Option.SET_META_CONTEXT):
        if kind & OPTION_ERROR:
            return {}
        context, number = bytes(data[4:]), int.from_bytes(data[:4])
        new = context in asked and context not in found and number not in found.values()
        if kind != OptionReply.META_CONTEXT or not new:
            wire.refuse("one of the contexts that were asked for, once each", printable(context))
        found[context] = number
    return found


def _go(wire: Wire, name: bytes, terms: Terms) -> Terms:
    asked = struct.pack(f">I{len(name)}sHH", len(name), name, 1, Info.BLOCK_SIZE)
    _send(wire, Option.GO, asked)
    for kind, data in _replies(wire, Option.GO):
        if kind & OPTION_ERROR:
            reason = OPTION_ERRORS.get(kind, f"answers with error {kind:#x}")
            text = f": {printable(bytes(data))}" if data else ""
            wire.fail(f"the NBD server refuses export {printable(name)}: it {reason}{text}")
        if kind != OptionReply.INFO or len(data) < 2:
            wire.refuse("information on the export", f"a reply of type {kind}")
        terms = _informed(wire, terms, data)
    if terms.size < 0:
        wire.refuse("the size of the export", "none")
    if terms.size % terms.block:
        wire.refuse(f"a size in blocks of {terms.block} bytes", f"{terms.size} bytes")
    return terms


def _informed(wire: Wire, terms: Terms, data: bytearray) -> Terms:
    kind = int.from_bytes(data[:2], "big")
    if kind == Info.EXPORT:
        if len(data) != 12:
            wire.refuse("12 bytes on the export", f"{len(data)}")
        size, flags = struct.unpack(">QH", data[2:])
        if size > _MAX_SIZE or not flags & Export.HAS_FLAGS:
            wire.refuse("a size below 8 EiB, and flags", f"size {size} and flags {flags:#x}")
        return replace(terms, size=size, flags=Export(flags))
    if kind == Info.BLOCK_SIZE:
        if len(data) != 14:
            wire.refuse("14 bytes on block sizes", f"{len(data)}")
        least, _, most = struct.unpack(">III", data[2:])
        if not 1 <= least <= _MAX_BLOCK or least & (least - 1) or most < least:
            wire.refuse("a minimum block size of 1 to 65536", f"{least}, at most {most}")
        return replace(terms, block=least, most=min(most, MAX_REQUEST) & -least)
    return terms


def _send(wire: Wire, option: Option, data: bytes) -> None:
    wire.send([memoryview(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)])


def _replies(wire: Wire, option: Option) -> Iterator[tuple[int, bytearray]]:
    """The replies to *option* before its ACK; an error is the last."""
    for _ in range(_MAX_REPLIES):
        kind, data = _reply(wire, option)
        if kind == OptionReply.ACK:
            return
        yield kind, data
        if kind & OPTION_ERROR:
            return
    wire.refuse(f"at most {_MAX_REPLIES} replies to {option.name}", "more")


def _reply(wire: Wire, option: Option) -> tuple[int, bytearray]:
    header = wire.receive(OPTION_REPLY.size)
    magic, answered, kind, length = OPTION_REPLY.unpack(header)
    if magic != OPTION_REPLY_MAGIC or answered != option:
        wire.refuse(f"a reply to {option.name}", printable(bytes(header)))
    if length > _MAX_REPLY:
        wire.refuse(f"a reply of at most {_MAX_REPLY} bytes", f"one of {length}")
    return kind, wire.receive(length)
