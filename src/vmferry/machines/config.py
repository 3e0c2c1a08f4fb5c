"""What a machine is made of, and reading that from a file.

::

    kind = "auto"               # or kvm, unicorn
    ram = "256MiB"
    cpus = 1
    preallocate = false         # take all of the memory from the beginning
    memory-file = "/dev/shm/vm" # its memory is this file, for a process of this host to go on with
    uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"

    [guest]                     # what the guest that comes with vmferry does
    working-set = "64MiB"       # the memory it walks over; default: half of ram
    rate = "200MB/s"            # or pages per second, or "unlimited"
    hot = 0.5                   # share of the working set that it rewrites; it reads the rest
    changed = 1.0               # share of a page that it changes when it rewrites it
    heartbeat = 0.1             # seconds between two lines on the serial port

    [[disk]]                    # one for each disk
    file = "journal.raw"        # beside this file, or absolute; or nbd://HOST/EXPORT
    format = "raw"              # or qcow2, and any other that QEMU knows
    read-only = false
    direct = false              # pass the host's page cache by
    share-rw = false            # let others write it at the same time; raw only
    werror = "enospc"           # a write that fails: report, ignore, enospc or stop
    rerror = "report"           # a read that fails: report, ignore or stop

    [ownership]                 # who may run the machine is kept here, and decides
    store = "file:/shared/vm.owner"     # or etcd://HOST:PORT/KEY, or none; default: beside the
                                        # image of the first disk, and without disks nobody

Every key has a default, but the file of a disk.  The guest keeps a journal on the first disk.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from vmferry.errors import StorageError, UsageError
from vmferry.ownership.store import open_store, record_beside
from vmferry.units import format_size, parse_rate, parse_size

from .devices.disk import OnError

PAGE: Final = 4096
NOBODY: Final = "none"
"""The store of a machine whose owner is kept nowhere."""

KINDS: Final = ("auto", "kvm", "unicorn")

_MIN_RAM: Final = 1 << 20
_MAX_RAM: Final = 500 << 30
"""What one table of page directories maps, less the hole for devices."""

_MAX_CPUS: Final = 64
_MAX_DISKS: Final = 16
_MAX_RATE: Final = 10**9
_MIN_HEARTBEAT: Final = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestConfig:
    """What the guest does; sizes in bytes.

    ``rate`` is how many pages per second it goes over, on all vCPUs together, once it has gone
    over all of them; ``None`` for as many as it can.  ``working_set`` is half of the RAM where it
    is ``None``.
    """

    working_set: int | None = None
    rate: int | None = None
    hot: float = 1.0
    changed: float = 1.0
    heartbeat: float = 0.1

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what cannot be."""
        size, rate = self.working_set, self.rate
        if size is not None and (size < PAGE or size % PAGE):
            raise UsageError(f"working-set: expected whole pages of {PAGE} bytes, found {size}")
        if rate is not None and not 1 <= rate <= _MAX_RATE:
            raise UsageError(f"rate: expected 1 to {_MAX_RATE} pages per second, found {rate}")
        _check_share("hot", self.hot, 0)
        _check_share("changed", self.changed, 0.001)
        if not _MIN_HEARTBEAT <= self.heartbeat <= 3600:
            raise UsageError(
                f"heartbeat: expected {_MIN_HEARTBEAT} to 3600 seconds, found {self.heartbeat:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """A disk: the path of its image, or an NBD URI; what it does is called as QEMU calls it."""

    file: str
    format: str = "raw"
    read_only: bool = False
    direct: bool = False
    share_rw: bool = False
    werror: OnError = OnError.ENOSPC
    rerror: OnError = OnError.REPORT

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what cannot be."""
        if self.rerror is OnError.ENOSPC:
            raise UsageError("rerror: expected report, ignore, stop, found 'enospc'")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnershipConfig:
    """Where the record of the owner is; see :func:`vmferry.ownership.store.open_store`."""

    store: str

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what cannot be."""
        if self.store != NOBODY:
            open_store(self.store)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """A machine; ``ram`` in bytes.  ``kind`` is how it is hosted, and no part of what it is."""

    kind: str = "auto"
    ram: int = 256 << 20
    cpus: int = 1
    preallocate: bool = False
    memory_file: str | None = None
    uuid: UUID | None = None
    guest: GuestConfig = field(default_factory=GuestConfig)
    disk: tuple[DiskConfig, ...] = ()
    ownership: OwnershipConfig | None = None

    @property
    def owner_store(self) -> str | None:
        """Where it is kept who may run the machine; ``None`` for nowhere.

        If nothing is said, beside the first image in a file that can be written.
        """
        if self.ownership is not None:
            return None if self.ownership.store == NOBODY else self.ownership.store
        for disk in self.disk:
            if not disk.read_only and not disk.file.startswith("nbd"):
                return record_beside(disk.file)
        return None

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what cannot be."""
        if len(self.disk) > _MAX_DISKS:
            raise UsageError(f"disk: expected at most {_MAX_DISKS}, found {len(self.disk)}")
        if self.kind not in KINDS:
            raise UsageError(f"kind: expected {', '.join(KINDS)}, found {self.kind!r}")
        if not _MIN_RAM <= self.ram <= _MAX_RAM or self.ram % PAGE:
            raise UsageError(
                f"ram: expected whole pages, from {format_size(_MIN_RAM)} to "
                f"{format_size(_MAX_RAM)}, found {self.ram} bytes"
            )
        if not 1 <= self.cpus <= _MAX_CPUS:
            raise UsageError(f"cpus: expected 1 to {_MAX_CPUS}, found {self.cpus}")


def _check_share(key: str, share: float, least: float) -> None:
    if not least <= share <= 1:
        raise UsageError(f"{key}: expected a share of {least:g} to 1, found {share:g}")


def read_config(path: str | os.PathLike[str]) -> MachineConfig:
    """The machine that a TOML file describes.

    Raises :class:`~vmferry.errors.StorageError` for a file that cannot be read, and
    :class:`UsageError`, which names the file and the key, for what is no machine.
    """
    file = Path(path)
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: expected UTF-8: {error}") from error
    try:
        return _machine(tomllib.loads(text), file.parent)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: expected TOML: {error}") from error
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error


def to_toml(config: MachineConfig) -> str:
    """A file that :func:`read_config` reads as *config*."""
    disks = [line for disk in config.disk for line in ("[[disk]]", *_lines(disk))]
    owned = [] if config.ownership is None else ["[ownership]", *_lines(config.ownership)]
    return "\n".join([*_lines(config), "[guest]", *_lines(config.guest), *disks, *owned, ""])


def _lines(
    part: MachineConfig | GuestConfig | DiskConfig | OwnershipConfig,
) -> Iterator[str]:
    for member in fields(part):
        match getattr(part, member.name):
            case GuestConfig() | OwnershipConfig() | tuple():
                continue
            case None if member.name == "rate":
                value = '"unlimited"'
            case None:
                continue
            case bool() as flag:
                value = str(flag).lower()
            case int() | float() as number:
                value = repr(number)
            case text:
                value = f'"{text}"'
        yield f"{member.name.replace('_', '-')} = {value}"


def _machine(values: Mapping[str, Any], beside: Path) -> MachineConfig:
    read = _read(values, MachineConfig, _MACHINE, "")
    if "memory_file" in read:
        read["memory_file"] = str(beside / read["memory_file"])
    read["disk"] = tuple(_beside(disk, beside) for disk in read.get("disk", ()))
    return MachineConfig(**read)


def _beside(disk: DiskConfig, directory: Path) -> DiskConfig:
    """With the path of its image made out from where the file of the machine is."""
    if disk.file.startswith("nbd"):
        return disk
    return replace(disk, file=str(directory / disk.file))


def _disks(values: object) -> list[DiskConfig]:
    if not isinstance(values, list) or not all(isinstance(value, Mapping) for value in values):
        raise UsageError(f"expected tables [[disk]], found {values!r}")
    disks = []
    for value in values:
        read = _read(value, DiskConfig, _DISK, "disk.")
        if not read.get("file"):
            raise UsageError("expected the file of a disk, found none")
        try:
            disks.append(DiskConfig(**read))
        except UsageError as error:
            raise UsageError(f"disk.{error}") from error
    return disks


def _guest(values: object) -> GuestConfig:
    if not isinstance(values, Mapping):
        raise UsageError(f"expected a table, found {values!r}")
    read = _read(values, GuestConfig, _GUEST, "guest.")
    try:
        return GuestConfig(**read)
    except UsageError as error:
        raise UsageError(f"guest.{error}") from error


def _ownership(values: object) -> OwnershipConfig:
    match values:
        case {"store": str(store), **rest} if not rest:
            return OwnershipConfig(store=store)
    raise UsageError(f"expected a table with store, found {values!r}")


Convert = Callable[[Any], Any]


def _read(
    values: Mapping[str, Any], cls: type, converters: Mapping[str, Convert], prefix: str
) -> dict[str, Any]:
    """The fields of *cls* that *values* gives, under their keys in the file."""
    keys = {f.name.replace("_", "-"): f.name for f in fields(cls)}
    read = {}
    for key, value in values.items():
        if key not in keys:
            raise UsageError(f"{prefix}{key}: no such key; there are {', '.join(keys)}")
        try:
            read[keys[key]] = converters[keys[key]](value)
        except UsageError as error:
            text = str(error)
            raise UsageError(
                text if text.startswith(("guest.", "disk.")) else f"{prefix}{key}: {text}"
            ) from error
    return read


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"expected text, found {value!r}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"expected true or false, found {value!r}")
    return value


def _on_error(value: object) -> OnError:
    try:
        return OnError(_text(value))
    except ValueError as error:
        raise UsageError(f"expected {', '.join(OnError)}, found {value!r}") from error


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(f"expected a whole number, found {value!r}")
    return value


def _number(value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UsageError(f"expected a number, found {value!r}")
    return float(value)


def _size(value: object) -> int:
    return parse_size(value) if isinstance(value, str) else _integer(value)


def _rate(value: object) -> int | None:
    """Pages per second: as they are, or from a size per second; ``None`` without limit."""
    if value == "unlimited":
        return None
    return parse_rate(value) // PAGE if isinstance(value, str) else _integer(value)


def _uuid(value: object) -> UUID:
    try:
        return UUID(_text(value))
    except ValueError as error:
        raise UsageError(f"expected a UUID, found {value!r}") from error


_MACHINE: Final[Mapping[str, Convert]] = {
    "kind": _text,
    "ram": _size,
    "cpus": _integer,
    "preallocate": _flag,
    "memory_file": _text,
    "uuid": _uuid,
    "guest": _guest,
    "disk": _disks,
    "ownership": _ownership,
}
_DISK: Final[Mapping[str, Convert]] = {
    "file": _text,
    "format": _text,
    "read_only": _flag,
    "direct": _flag,
    "share_rw": _flag,
    "werror": _on_error,
    "rerror": _on_error,
}
_GUEST: Final[Mapping[str, Convert]] = {
    "working_set": _size,
    "rate": _rate,
    "hot": _number,
    "changed": _number,
    "heartbeat": _number,
}
