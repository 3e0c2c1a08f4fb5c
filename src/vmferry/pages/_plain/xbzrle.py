"""XBZRLE, QEMU 7.2 ``migration/xbzrle.c``."""

from __future__ import annotations

from .types import Bytes, Room


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
