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

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .declare import device, state, vmstate_of
    from .description import declared
    from .transfer import Staged, describe, load, save, stage
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

_LAZY = {
    "Array": "types",
    "Bitmap": "types",
    "Buffer": "types",
    "Codec": "types",
    "Custom": "types",
    "Float64": "types",
    "Gap": "types",
    "I16": "types",
    "I32": "types",
    "I64": "types",
    "I8": "types",
    "Local": "types",
    "Queue": "types",
    "Staged": "transfer",
    "Subsection": "types",
    "Temporary": "types",
    "Timer": "types",
    "Tree": "types",
    "U16": "types",
    "U32": "types",
    "U64": "types",
    "U8": "types",
    "VarArray": "types",
    "VarBuffer": "types",
    "at_most": "types",
    "at_version": "types",
    "before": "types",
    "declared": "description",
    "describe": "transfer",
    "device": "declare",
    "equal": "types",
    "load": "transfer",
    "named": "types",
    "of": "types",
    "save": "transfer",
    "since": "types",
    "stage": "transfer",
    "state": "declare",
    "subsection": "types",
    "vmstate_of": "declare",
    "when": "types",
}

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


def __getattr__(name: str) -> Any:
    # Who only reads what others saved needs none of this.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
