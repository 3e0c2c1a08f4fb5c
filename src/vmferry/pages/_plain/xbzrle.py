"""XBZRLE, QEMU 7.2 ``migration/xbzrle.c``."""

from __future__ import annotations

import numpy as np

from .types import U8, Bytes, Room


def xbzrle_decode(encoded: Bytes, page: Room) -> bool:
    """Patch *page* in place; false where *encoded* breaks a rule, with *page* then half patched.

    QEMU 7.2 ``migration/xbzrle.c``: pairs of an unchanged run and a changed run with its new bytes.
    """
    at = position = 0
    while at < len(encoded):
        if len(encoded) - at < 2:
            return False
        same, taken = _uleb(encoded, at)
        if not taken or (same == 0 and at != 0) or same > len(page) - position:
            return False
        at, position = at + taken, position + same
        changed, taken = _uleb(encoded, at)
        if not taken or changed == 0 or changed > len(page) - position:
            return False
        at += taken
        if changed > len(encoded) - at:
            return False
        page[position : position + changed] = encoded[at : at + changed]
        at, position = at + changed, position + changed
    return True


def _uleb(data: Bytes, at: int) -> tuple[int, int]:
    head = bytes(data[at : at + 2])
    if not head:
        return 0, 0
    if head[0] < 0x80:
        return head[0], 1
    if len(head) < 2 or head[1] >= 0x80:
        return 0, 0
    return (head[0] & 0x7F) | head[1] << 7, 2


def xbzrle_encode(old: Bytes | U8, new: Bytes | U8, out: Room | U8) -> int:
    """Write what turns the page *old* into *new* into *out*; returns the bytes written.

    0 where nothing changed; -1 where they do not fit into *out* or into as many bytes as the page
    has.  Runs are as long as can be, as in QEMU.  Both are of one size, a multiple of 64 up to
    16384.
    """
    size = len(new)
    if size != len(old) or size % 64 or not 0 < size <= 16384:
        raise ValueError("xbzrle_encode: pages of two sizes, or no multiple of 64 up to 16384")
    room = min(len(out), size)
    after = np.frombuffer(new, np.uint8)
    changed = np.frombuffer(old, np.uint8) != after
    # Where runs begin, changed and unchanged in turn, and the end of the page.
    edges = np.flatnonzero(np.diff(changed, prepend=False, append=False)).tolist()
    target = np.frombuffer(out, np.uint8)
    at = end = 0
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        head = _length(start - end), _length(stop - start)
        if room - at < 2 or room - at - len(head[0]) < 2 or stop - start > 0x3FFF:
            return -1
        piece = head[0] + head[1] + after[start:stop].tobytes()
        if len(piece) > room - at:
            return -1
        target[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at, end = at + len(piece), stop
    # QEMU looks for room before it finds that nothing follows.
    return -1 if end < size and room - at < 2 else at


def _length(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7 & 0xFF])
