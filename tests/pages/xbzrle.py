"""An XBZRLE encoder, for tests alone: maximal runs, as QEMU 7.2 migration/xbzrle.c sends them."""

from __future__ import annotations


def encode(old: bytes, new: bytes) -> bytes | None:
    """*new* relative to *old*; ``None`` where it would take more bytes than the page."""
    out, room = bytearray(), len(new)
    at = 0
    while at < len(new):
        if room - len(out) < 2:
            return None
        same = _run(old, new, at, equal=True)
        if at + same == len(new):
            return bytes(out)
        start = at + same
        changed = _run(old, new, start, equal=False)
        at = start + changed
        out += uleb(same)
        if room - len(out) < 2:
            return None
        out += uleb(changed) + new[start:at]
        if len(out) > room:
            return None
    return bytes(out)


def _run(old: bytes, new: bytes, at: int, *, equal: bool) -> int:
    end = at
    while end < len(new) and (old[end] == new[end]) == equal:
        end += 1
    return end - at


def uleb(value: int) -> bytes:
    """A run length: one byte below 128, else two."""
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])
