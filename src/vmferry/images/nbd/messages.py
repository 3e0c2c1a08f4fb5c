"""The numbers and layouts of NBD, by the names of its doc/proto.md without ``NBD_``."""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag
from typing import Final

INIT_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_MAGIC: Final = 0x67446698
STRUCTURED_MAGIC: Final = 0x668E33EF

FIXED_NEWSTYLE: Final = 1
NO_ZEROES: Final = 2

GREETING: Final = struct.Struct(">8s8sH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">8sII")
OPTION_REPLY: Final = struct.Struct(">QIII")
REQUEST: Final = struct.Struct(">IHHQQI")
SIMPLE: Final = struct.Struct(">IQ")
"""What follows the magic of a simple reply: error, cookie."""
STRUCTURED: Final = struct.Struct(">HHQI")
"""What follows the magic of a structured reply: flags, type, cookie, length."""

ALLOCATION: Final = b"base:allocation"
DEPTH: Final = b"qemu:allocation-depth"
"""How many layers down something stands: ``docs/interop/nbd.txt`` of QEMU."""
DONE: Final = 1
"""Flag of a structured reply: the last of its request."""


class Option(IntEnum):
    """What a client can ask for before the data phase."""

    ABORT = 2
    GO = 7
    STRUCTURED_REPLY = 8
    SET_META_CONTEXT = 10


class OptionReply(IntEnum):
    """The answers to an option that are no error."""

    ACK = 1
    INFO = 3
    META_CONTEXT = 4


OPTION_ERROR: Final = 1 << 31
ERR_TLS_REQUIRED: Final = OPTION_ERROR | 5

OPTION_ERRORS: Final = {
    OPTION_ERROR | 1: "does not know what it was asked",
    OPTION_ERROR | 2: "does not allow it",
    OPTION_ERROR | 3: "says that the request is invalid",
    OPTION_ERROR | 4: "cannot do it on its platform",
    ERR_TLS_REQUIRED: "asks for TLS, which is not supported here",
    OPTION_ERROR | 6: "has no such export",
    OPTION_ERROR | 7: "is shutting down",
    OPTION_ERROR | 8: "asks for block sizes to be respected",
    OPTION_ERROR | 9: "says that the request is too big",
}


class Info(IntEnum):
    """Kinds of INFO."""

    EXPORT = 0
    BLOCK_SIZE = 3


class Export(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    FLUSH = 4
    FUA = 8
    TRIM = 32
    WRITE_ZEROES = 64
    DF = 128


class Command(IntEnum):
    """Requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of requests."""

    NONE = 0
    FUA = 1
    NO_HOLE = 2
    DF = 4
    """Do not fragment: a read is answered by one chunk."""


class Chunk(IntEnum):
    """Types of structured replies."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 32769
    ERROR_OFFSET = 32770


DEPTH_OWN: Final = 1
"""Of ``qemu:allocation-depth``: it stands in the image itself."""

STATUS_ZERO: Final = 2
"""Flag of ``base:allocation``: reads as zeroes."""

ERRORS: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}
"""Numbers on the wire, which are those of Linux but do not have to be the host's."""
