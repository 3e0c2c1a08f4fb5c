"""Device state: declared once by annotations, saved, loaded and described; or read as it came.

A device is a class whose annotations say how its attributes are sent::

    @device("serial", version=3, minimum_version=2)
    @dataclass
    class Serial:
        divider: U16 = 0
        ier: U8 = 0
        fcr: Annotated[U8, since(3)] = 0
        fifo: Annotated[bytearray, Buffer(16)] = field(default_factory=lambda: bytearray(16))
        irq: Local[Line | None] = None  # not migrated

:func:`save` and :func:`load` are all it takes; what can be declared is in :mod:`.types`.
"""

from .declare import device, state, vmstate_of
from .describe import declared, describe
from .transfer import Staged, load, save, stage
from .types import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    Buffer,
    Codec,
    Custom,
    Float64,
    Gap,
    Local,
    Queue,
    Subsection,
    Temporary,
    Timer,
    Tree,
    VarArray,
    VarBuffer,
    at_most,
    at_version,
    before,
    equal,
    named,
    of,
    since,
    subsection,
    when,
)

__all__ = [
    "I8",
    "I16",
    "I32",
    "I64",
    "U8",
    "U16",
    "U32",
    "U64",
    "Array",
    "Bitmap",
    "Buffer",
    "Codec",
    "Custom",
    "Float64",
    "Gap",
    "Local",
    "Queue",
    "Staged",
    "Subsection",
    "Temporary",
    "Timer",
    "Tree",
    "VarArray",
    "VarBuffer",
    "at_most",
    "at_version",
    "before",
    "declared",
    "describe",
    "device",
    "equal",
    "load",
    "named",
    "of",
    "save",
    "since",
    "stage",
    "state",
    "subsection",
    "vmstate_of",
    "when",
]
