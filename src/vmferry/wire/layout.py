"""Numbers of the stream: section types, commands, flags.

QEMU 7.2 ``migration/savevm.h``, ``migration/savevm.c``, ``migration/ram.c``, ``migration/block.c``,
``migration/block-dirty-bitmap.c``.  The flags of page records stand with the kernels that read
them, in :mod:`vmferry.pages.rows`.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

MAGIC: Final = b"QEVM"
VERSION: Final = 3


class Kind(IntEnum):
    """The type byte in front of everything in a stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


RAM_SECTION: Final = "ram"
DISK_SECTION: Final = "block"
BITMAP_SECTION: Final = "dirty-bitmap"

# Records of the `ram` section that carry no page.
RAM_FULL: Final = 0x001
RAM_SIZES: Final = 0x004
RAM_END: Final = 0x010
RAM_HOOK: Final = 0x080
RAM_FLUSH: Final = 0x200

# Records of the `block` section.
DISK_CHUNK: Final = 0x01
DISK_END: Final = 0x02
DISK_PROGRESS: Final = 0x04
DISK_ZERO: Final = 0x08
DISK_CHUNK_SIZE: Final = 1 << 20
SECTOR: Final = 512


class BitmapFlag(IntFlag):
    """First byte of a record in the `dirty-bitmap` section."""

    EOS = 0x01
    ZEROES = 0x02
    BITMAP_NAME = 0x04
    NODE_NAME = 0x08
    START = 0x10
    COMPLETE = 0x20
    BITS = 0x40
    EXTRA = 0x80


# Capabilities that change the layout of the RAM block list.
IGNORE_SHARED: Final = "x-ignore-shared"
MAPPED_RAM: Final = "mapped-ram"
