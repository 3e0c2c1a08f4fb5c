"""What the name of a machine type tells of its stream."""

from __future__ import annotations

import re
from typing import Final

from .configuration import Configuration

_PAGES_OF_8K: Final = (
    "clipper",
    "sun4u",
    "sun4v",
    "niagara",
    "or1k-sim",
    "virt-or1k",
    "axis-dev88",
)
"""Machines of alpha, sparc64, openrisc and cris (QEMU 7.2 ``target/*/cpu-param.h``)."""

_VERSIONED: Final = re.compile(r"-(\d+)\.(\d+)$")


def target_page_size(configuration: Configuration | None) -> int:
    """Bytes of a target page: what the stream says, or else what the machine is known to have.

    An absent field means the architecture's minimum, 4096 on nearly all.
    """
    if configuration is None:
        return 4096
    if configuration.page_bits is not None:
        return 1 << configuration.page_bits
    return 8192 if configuration.machine.lower() in _PAGES_OF_8K else 4096


def machine_version(machine: str) -> tuple[int, int] | None:
    """The version in a machine type's name: (7, 2) for ``pc-i440fx-7.2``; ``None`` without one."""
    match = _VERSIONED.search(machine)
    return (int(match[1]), int(match[2])) if match else None
