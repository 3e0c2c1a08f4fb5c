"""What a migration may make use of: the capabilities of QEMU that vmferry has, by QEMU's names.

QEMU 7.2 ``qapi/migration.json`` and ``migrate_caps_check`` in ``migration/migration.c``.  All are
off at first.  They are checked as a set: what is refused is a combination, not an order of calls.
They do not change while a migration is under way; whoever knows that has to refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from enum import StrEnum
from reprlib import repr as shortened
from typing import Final

from vmferry.errors import UsageError

from .names import unknown


class Capability(StrEnum):
    """What can be turned on, and on which side it counts."""

    XBZRLE = "xbzrle"
    """Source: send what changed in a page that was sent before.  Without effect with multifd."""
    AUTO_CONVERGE = "auto-converge"
    """Source: slow the machine down while it writes faster than its memory can be sent."""
    ZERO_BLOCKS = "zero-blocks"
    """Source: with block, say of chunks that are zero only that they are."""
    COMPRESS = "compress"
    """Destination: accept compressed pages of a QEMU older than 9.1."""
    EVENTS = "events"
    """Each: emit MIGRATION and MIGRATION_PASS."""
    POSTCOPY_RAM = "postcopy-ram"
    """Both: the source may let the machine go before its memory (``migrate-start-postcopy``)."""
    BLOCK = "block"
    """Both: the disks move along, onto images that the destination has to itself."""
    RETURN_PATH = "return-path"
    """Source: ask for the destination's word that it has loaded everything."""
    PAUSE_BEFORE_SWITCHOVER = "pause-before-switchover"
    """Source: stop at ``pre-switchover``, with the machine stopped, until told to go on."""
    MULTIFD = "multifd"
    """Both: pages on channels of their own."""
    DIRTY_BITMAPS = "dirty-bitmaps"
    """Source: the dirty bitmaps of disks move along."""
    POSTCOPY_BLOCKTIME = "postcopy-blocktime"
    """Destination: tell how long its processors waited for memory."""
    LATE_BLOCK_ACTIVATE = "late-block-activate"
    """Destination: leave the disks of a machine that arrives stopped alone until ``cont``."""
    IGNORE_SHARED = "x-ignore-shared"
    """Both: do not send RAM blocks that both sides have mapped from the same file."""
    VALIDATE_UUID = "validate-uuid"
    """Source: send the machine's UUID, which the destination compares with its own."""
    POSTCOPY_PREEMPT = "postcopy-preempt"
    """Both: a channel of its own for the pages that are asked for."""


NOT_SUPPORTED: Final = (
    "rdma-pin-all",
    "x-colo",
    "release-ram",
    "background-snapshot",
    "zero-copy-send",
)
"""The other capabilities of QEMU 7.2.  They can be turned off, as whoever sets all of them does."""


def checked(
    current: frozenset[Capability], changes: Mapping[str, bool], *, incoming: bool
) -> frozenset[Capability]:
    """What is on after *changes*, by name; *incoming* for a machine that waits for a migration.

    Raises :class:`~vmferry.errors.UsageError`, and nothing has changed then.
    """
    wanted = set(current)
    for name, state in changes.items():
        _check(name, state)
        if state:
            wanted.add(Capability(name))
        elif name in current:
            wanted.remove(Capability(name))
    _check_set(wanted, incoming=incoming)
    return frozenset(wanted)


def to_qmp(capabilities: frozenset[Capability]) -> list[dict[str, object]]:
    """The answer to ``query-migrate-capabilities``: those that vmferry has, in QEMU's order."""
    return [{"capability": str(one), "state": one in capabilities} for one in Capability]


def _check(name: str, state: object) -> None:
    if name not in (known := [*Capability, *NOT_SUPPORTED]):
        raise unknown("capability", name, known)
    if not isinstance(state, bool):
        raise UsageError(f"capability {name} is true or false, not {shortened(state)}")
    if state and name in NOT_SUPPORTED:
        raise UsageError(f"capability {name} is not supported by vmferry (yet)")


def _check_set(wanted: Set[Capability], *, incoming: bool) -> None:
    _check_postcopy(wanted)
    if Capability.COMPRESS not in wanted:
        return
    if Capability.MULTIFD in wanted:
        raise UsageError(
            "compress cannot be on with multifd, whose pages it does not compress; turn compress "
            "off and set the parameter multifd-compression"
        )
    if not incoming:
        raise UsageError(
            "compress is accepted by a destination only; to send compressed pages turn multifd on "
            "and set the parameter multifd-compression"
        )


def _check_postcopy(wanted: Set[Capability]) -> None:
    if Capability.POSTCOPY_RAM not in wanted:
        if Capability.POSTCOPY_PREEMPT in wanted:
            raise UsageError("postcopy-preempt needs postcopy-ram: turn that on as well")
        return
    if Capability.IGNORE_SHARED in wanted:
        raise UsageError("postcopy-ram cannot be on with x-ignore-shared: turn one of them off")
    if Capability.POSTCOPY_PREEMPT in wanted and Capability.COMPRESS in wanted:
        raise UsageError("postcopy-preempt cannot be on with compress: turn one of them off")
