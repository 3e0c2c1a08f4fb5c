"""What a monitor tells of the disks of a hosted machine, in the shapes of QEMU.

QEMU 7.2 ``qapi/block-core.json``: ``BlockInfo`` and ``BLOCK_IO_ERROR``.  There are no block nodes
to be named, no limits of rates, and backing files are left to the storage daemon.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vmferry.machines import DiskConfig, HostedMachine, IoError
from vmferry.machines.devices.disk import Disk
from vmferry.migration.bitmaps import DirtyBitmaps
from vmferry.qemu.messages import Object

_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")
_SECTOR = 512


def query_block(machine: HostedMachine, bitmaps: DirtyBitmaps) -> list[Object]:
    """The answer to ``query-block``."""
    shown = list(map(_info, machine.disks, machine.config.disk))
    for bitmap in bitmaps:
        (inserted,) = (one["inserted"] for one in shown if one["device"] == bitmap.node)
        inserted.setdefault("dirty-bitmaps", []).append(
            {
                "name": bitmap.name,
                "granularity": bitmap.granularity,
                "count": bitmap.count,
                "recording": bitmap.log.records,
                "busy": bitmaps.is_busy,
                "persistent": False,
            }
        )
    return shown


def block_io_error(failed: IoError) -> Object:
    """The data of ``BLOCK_IO_ERROR``."""
    return {
        "device": failed.disk.name,
        "operation": "read" if failed.is_read else "write",
        "action": str(failed.action),
        "reason": str(failed.error),
    } | ({"nospace": failed.error.no_space} if failed.disk.can_stop else {})


def _info(disk: Disk, wanted: DiskConfig) -> Object:
    info: Object = {
        "device": disk.name,
        "type": "unknown",
        "removable": False,
        "locked": False,
        "inserted": _inserted(disk, wanted),
    }
    return info | ({"io-status": str(disk.io_status)} if disk.can_stop else {})


def _inserted(disk: Disk, wanted: DiskConfig) -> Object:
    image: Object = {
        "filename": disk.image.name,
        "format": wanted.format,
        "virtual-size": disk.image.size,
    }
    with suppress(OSError):  # it is on a server, or it has vanished
        image["actual-size"] = Path(wanted.file).stat().st_blocks * _SECTOR
    return {
        "file": disk.image.name,
        "drv": wanted.format,
        "ro": disk.image.read_only,
        "image": image,
        "cache": {"writeback": True, "direct": wanted.direct, "no-flush": False},
        "encrypted": False,
        "detect_zeroes": "off",
        "backing_file_depth": 0,
        "write_threshold": 0,
        **dict.fromkeys(_LIMITS, 0),
    }
