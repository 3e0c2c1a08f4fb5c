"""A disk that is driven through a ring of requests in guest memory.

Registers of 64 bits, which may be written in halves, the low one first::

     0   capacity in bytes, read only
     8   physical address of the ring
    16   how many requests the ring holds, a power of two up to 256
    24   how many requests were put into it so far, modulo 2**64; writing it makes the disk look
    32   how many of them are done, read only
    40   1 where the disk is read only, read only

Request *n* is at place *n* modulo the size of the ring, in 32 bytes::

     0   u32  0 read, 1 write, 2 flush, 3 discard
     4   u32  0 pending; the disk writes 1 for done, 2 for failed
     8   u64  offset on the disk, a multiple of 512
    16   u64  physical address of the data
    24   u64  length, a multiple of 512 up to 1 MiB

Requests are done one after the other, in a thread of the disk, while the machine runs.  Where the
machine is stopped, those that were not begun stay in the ring, and go on where it goes on: they are
part of guest memory, and how far the disk has come is part of its state.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Final, Protocol

from vmferry.errors import ImageInactive, MachineError, StorageError
from vmferry.images import Image
from vmferry.migration.disks import disk_name
from vmferry.vmstate import U8, U32, U64, Local, device, equal

READ, WRITE, FLUSH, DISCARD = range(4)
DONE, FAILED = 1, 2

SECTOR: Final = 512
_REQUEST: Final = struct.Struct("<IIQQQ")
_MAX_RING: Final = 256
_MAX_LENGTH: Final = 1 << 20
_LOW: Final = (1 << 64) - 1


class OnError(StrEnum):
    """What to do with a request that the storage refuses: QEMU's ``werror`` and ``rerror``."""

    REPORT = "report"
    """The guest is told."""
    IGNORE = "ignore"
    """The guest is told that it was done."""
    ENOSPC = "enospc"
    """The machine stops where there is no room, and else the guest is told; for writes only."""
    STOP = "stop"
    """The machine stops."""


class Action(StrEnum):
    """What was done: QEMU's ``BlockErrorAction``."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class IoStatus(StrEnum):
    """QEMU's ``BlockDeviceIoStatus``: why a disk has stopped its machine."""

    OK = "ok"
    FAILED = "failed"
    NO_SPACE = "nospace"


@dataclass(frozen=True, slots=True)
class IoError:
    """A request that the storage refused."""

    disk: Disk
    is_read: bool
    action: Action
    error: StorageError

    def stops(self) -> bool:
        """Whether the machine is to stand still for it, and has not gone on since."""
        return self.action is Action.STOP and self.disk.io_status is not IoStatus.OK


class Ram(Protocol):
    """Physical memory, for devices that read and write it themselves."""

    def at(self, address: int, length: int) -> memoryview | None:
        """*length* bytes at a physical address; ``None`` where they are not all RAM."""


@device("disk", version=1)
@dataclass(slots=True)
class Disk:
    """A disk on *image*; ``failed`` is told, in its thread, of what the storage refused.

    Where the action is to stop, whoever is told has the machine paused, by another thread.  The
    disk does nothing meanwhile, and the request once more when the machine goes on.  ``werror`` is
    for whatever is no read.
    """

    image: Local[Image]
    ram: Local[Ram]
    failed: Local[Callable[[IoError], None]]
    capacity: Annotated[U64, equal]
    read_only: Annotated[U8, equal]
    number: Annotated[U32, equal] = 0
    ring: U64 = 0
    entries: U64 = 0
    head: U64 = 0
    tail: U64 = 0
    low: U32 = 0
    werror: Local[OnError] = OnError.ENOSPC
    rerror: Local[OnError] = OnError.REPORT
    io_status: Local[IoStatus] = IoStatus.OK
    worker: Local[Any] = field(default=None)

    def __post_init__(self) -> None:
        self.worker = Worker(self._next, f"disk-{self.number}")

    @property
    def name(self) -> str:
        """What it is called in the stream, and to operators."""
        return disk_name(self.number)

    @property
    def can_stop(self) -> bool:
        """Whether an error may stop the machine, and ``io_status`` say so."""
        return self.werror in {OnError.ENOSPC, OnError.STOP} or self.rerror is OnError.STOP

    def post_load(self, _version: int) -> None:
        """Refuse a ring that no guest can have made."""
        if self.entries > _MAX_RING or self.entries & (self.entries - 1):
            raise ValueError(f"the ring has a power of two of places up to {_MAX_RING}")

    def check(self) -> None:
        """Raise :class:`StorageError` where the image is not as large as the disk."""
        if self.image.size != self.capacity:
            raise StorageError(
                f"{self.image.name}: expected {self.capacity} bytes, found {self.image.size}: it"
                " was made larger or smaller while it was inactive here"
            )

    def read(self, offset: int, size: int) -> int:
        """A register, or a part of it."""
        registers = (
            *(self.capacity, self.ring, self.entries, self.head, self.tail),
            self.read_only,
        )
        if offset >= 8 * len(registers):
            return 0
        return registers[offset // 8] >> 8 * (offset % 8) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """A register, whole or in halves of which the high one comes last."""
        match size, offset % 8:
            case 8, 0:
                self._set(offset, value)
            case 4, 0:
                self.low = value
            case 4, 4:
                self._set(offset - 4, value << 32 | self.low)

    def _set(self, register: int, value: int) -> None:
        match register:
            case 8:
                self.ring = value
            case 16 if 1 <= value <= _MAX_RING and not value & (value - 1):
                self.entries = value
            case 24:
                self.head = value
                self.worker.wake()

    def start(self) -> None:
        """Do requests; the image is active."""
        self.io_status = IoStatus.OK
        self.worker.resume()

    def stop(self) -> None:
        """Begin no more."""
        self.worker.pause()

    def drain(self) -> None:
        """Wait for what was begun: when this returns nothing of guest memory or the image changes.

        Unless :meth:`start` was called meanwhile, which ends the wait.
        """
        self.worker.drain()

    def close(self) -> None:
        """End the thread."""
        self.worker.close()

    def _next(self) -> bool:
        """Do the next request, in the thread; whether there was one."""
        if self.io_status is not IoStatus.OK:
            return False
        waiting = (self.head - self.tail) & _LOW
        if not self.entries or not 0 < waiting <= self.entries:
            return False
        place = self.ram.at(
            (self.ring + self.tail % self.entries * _REQUEST.size) & _LOW, _REQUEST.size
        )
        if place is None:
            return False
        kind, _, offset, address, length = _REQUEST.unpack(place)
        try:
            done = self._do(kind, offset, address, length)
        except Exception as error:  # noqa: BLE001 - whatever it is, the guest must not go on
            if not isinstance(error, StorageError):
                error = StorageError(f"{self.image.name}: {type(error).__name__}: {error}")
            action = self._action(error, is_read=kind == READ)
            if action is Action.STOP:
                self.io_status = IoStatus.NO_SPACE if error.no_space else IoStatus.FAILED
            self.failed(IoError(self, kind == READ, action, error))
            if action is Action.STOP:
                return False
            done = action is Action.IGNORE
        self.tail = (self.tail + 1) & _LOW
        # The guest looks for this, so it comes last.
        place[4:8] = (DONE if done else FAILED).to_bytes(4, "little")
        return True

    def _action(self, error: StorageError, *, is_read: bool) -> Action:
        match self.rerror if is_read else self.werror:
            case _ if isinstance(error, ImageInactive):
                return Action.STOP  # the machine is not to run here at all
            case OnError.ENOSPC:
                return Action.STOP if error.no_space else Action.REPORT
            case wanted:
                return Action(wanted)

    def _do(self, kind: int, offset: int, address: int, length: int) -> bool:
        """Do a request; false for one that makes no sense."""
        image = self.image
        if kind == FLUSH:
            image.flush()
            return True
        if not 0 < length <= _MAX_LENGTH or (offset | length) % SECTOR:
            return False
        if offset + length > self.capacity or (kind != READ and image.read_only):
            return False
        if kind == DISCARD:
            image.discard(offset, length)
            return True
        data = self.ram.at(address, length)
        if data is None or kind not in {READ, WRITE}:
            return False
        if kind == READ:
            image.read(offset, data)
        else:
            # The guest may change it meanwhile, and what is written must be of one moment.
            image.write(offset, bytes(data))
        return True


class Worker:
    """A thread that does one piece of work after the other while it is not paused."""

    def __init__(self, work: Callable[[], bool], name: str) -> None:
        self._work = work
        self._changed = threading.Condition()
        self._runs = False
        self._is_inside = False
        self._is_asked = False
        self._closing = False
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There may be work."""
        with self._changed:
            self._is_asked = True
            self._changed.notify_all()

    def resume(self) -> None:
        """Work."""
        with self._changed:
            self._runs = self._is_asked = True
            self._changed.notify_all()

    def pause(self) -> None:
        """Begin no more."""
        with self._changed:
            self._runs = False

    def drain(self) -> None:
        """Wait until nothing is being done, or it is resumed."""
        with self._changed:
            if threading.current_thread() is self._thread:
                raise MachineError("a disk cannot wait for itself")
            self._changed.wait_for(lambda: self._runs or not self._is_inside)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _main(self) -> None:
        while True:
            with self._changed:
                self._is_inside = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing or (self._runs and self._is_asked))
                if self._closing:
                    return
                self._is_inside = True
                self._is_asked = False
            while self._runs and self._work():
                pass
