"""What the reader accepts at the most: the peer's numbers are held against these before use."""

from __future__ import annotations

from typing import Final

CONFIG_NAME: Final = 255
"""Bytes of the machine type's name; the longest of QEMU 8.2 has 24."""

CAPABILITIES: Final = 64
"""Capability names in the configuration; QEMU 8.2 has 23 in all and sends at most two."""

DEVICE_SECTION: Final = 64 << 20
"""Bytes of one device section; the largest on stock machines are video adapters below 1 MiB."""

DEVICES: Final = 256 << 20
"""Bytes of all device sections of a stream together."""

DEVICE_COUNT: Final = 32_768
"""Device sections of one stream: QEMU has at most 4096 CPUs of three sections each, and others."""

PACKAGE: Final = 256 << 20
"""Bytes of a PACKAGED command; QEMU allows 4 GiB - 1, and machines with many disks need 1 MiB."""

DESCRIPTION: Final = 16 << 20
"""Bytes of the closing JSON; usual are 50 to 150 KiB."""

JSON_DEPTH: Final = 32
"""Brackets open at once in the closing JSON; usual are 12."""

JSON_TOKENS: Final = 1_000_000
"""Brackets, commas and colons in the closing JSON; usual are 15,000."""

RAM_BLOCKS: Final = 4096
"""RAM blocks of one machine; a machine with 256 memory slots and 30 adapters has some 400."""

ITERABLES: Final = 1024
"""Iterable sections of one stream; QEMU has at most five, a machine in Python one for a device."""

FRAME: Final = 1 << 20
"""Bytes in one piece of an iterable section of a machine in Python."""

DISKS: Final = 1024
"""Disks in one `block` section."""

BITMAPS: Final = 4096
"""Dirty bitmaps in one stream."""

BITMAP_DATA: Final = 10 << 10
"""Bytes of one piece of a dirty bitmap, as QEMU's destination limits it."""

MULTIFD_PAYLOAD: Final = 1 << 20
"""Payload bytes of a multifd packet: the size of a QEMU destination's buffer."""
