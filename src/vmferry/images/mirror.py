"""An image that becomes the copy of another one which is in use, and stays it until it is ended.

What QEMU's ``blockdev-mirror`` does (``block/mirror.c``), in chunks of 1 MiB: all that there is, in
a first pass, and then what was written meanwhile, again and again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Final

from vmferry.errors import StorageError, VmferryError

from .changes import CHUNK, ChangeLog
from .filling import clear, fill, has_data
from .image import Image

_LOOK: Final = 0.02
"""Seconds between two looks at what was written."""

_SECTOR: Final = 512
"""QEMU serves whole sectors of a raw file of any size; unasked it writes nothing behind its end."""

_MOMENT: Final = 0.1
"""Seconds that copying what is left may take, where both sides count as alike."""


class MirrorStatus(StrEnum):
    """Those of QEMU's ``JobStatus`` that there are."""

    RUNNING = "running"
    READY = "ready"
    """Both are alike, but for what was written in a last moment."""
    CONCLUDED = "concluded"


class Mirror:
    """Copies *source* onto *target*, which is active, in a thread of its own.

    *target* is as large, or ends with the sector in which *source* does.  With *own* only what
    *source* has itself is copied, and not what its backing file has.  *changed* is told of each
    status, in that thread.  ``total`` grows with what is written, as QEMU counts; ``done`` is what
    has been copied.  Without an ``error`` behind its end both were alike then.
    """

    def __init__(
        self,
        source: Image,
        target: Image,
        *,
        own: bool = False,
        changed: Callable[[MirrorStatus], None] = lambda _: None,
    ) -> None:
        if target.size not in {source.size, -(-source.size // _SECTOR) * _SECTOR}:
            raise StorageError(
                f"{target.name}: expected {source.size} bytes, as {source.name} has, found"
                f" {target.size}"
            )
        self._source = source
        self._target = target
        self._own = own
        self._changed = changed
        self._buffer = memoryview(mmap(-1, CHUNK, MAP_PRIVATE | MAP_ANONYMOUS))
        self._woken = threading.Event()
        self._is_unwanted = self._is_last = False
        self.status = MirrorStatus.RUNNING
        self.error: VmferryError | None = None
        self.done = 0
        self._unsent = source.size
        self._log = source.log_changes()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    @property
    def total(self) -> int:
        """Bytes that have been copied, or are known to be left."""
        return self.done + self._unsent + (0 if self._has_ended else self._log.pending)

    @property
    def _has_ended(self) -> bool:
        return self.status is MirrorStatus.CONCLUDED

    def finish(self) -> None:
        """End it as soon as both are alike: nothing is written to *source* any more."""
        self._is_last = True
        self._woken.set()

    def cancel(self) -> None:
        """End it, whatever has been copied: that is an error of it, as it is no copy."""
        self._is_unwanted = True
        self._woken.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, *timeout* seconds at most; whether it has ended."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            with self._log as log:
                self._copy_all()
                self._follow(log)
                self._target.flush()
        except VmferryError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - whoever asks is told, and the machine runs on
            self.error = VmferryError(f"this is a bug in vmferry: {error!r}")
        self._reach(MirrorStatus.CONCLUDED)

    def _copy_all(self) -> None:
        for number, is_data in enumerate(has_data(self._source, own=self._own)):
            self._check_wanted()
            start = number * CHUNK
            length = min(CHUNK, self._source.size - start)
            if is_data:
                self._copy(start, length)
            elif not self._own:
                clear(self._target, start, length)
                self.done += length
            self._unsent -= length

    def _follow(self, log: ChangeLog) -> None:
        while True:
            self._check_wanted()
            is_last = self._is_last
            begun = time.monotonic()
            numbers = log.take()
            for number in numbers:
                self._check_wanted()
                start = number * CHUNK
                self._copy(start, min(CHUNK, self._source.size - start))
            is_near = time.monotonic() - begun <= _MOMENT
            if self.status is MirrorStatus.RUNNING and is_near:
                self._target.flush()
                self._reach(MirrorStatus.READY)
            if numbers:
                continue
            if is_last:
                return
            self._woken.wait(_LOOK)
            self._woken.clear()

    def _check_wanted(self) -> None:
        if self._is_unwanted:
            raise VmferryError("it was cancelled")

    def _copy(self, start: int, length: int) -> None:
        data = self._buffer
        self._source.read(start, data[:length])
        data[length:] = bytes(CHUNK - length)
        fill(self._target, start, data, length)
        self.done += length

    def _reach(self, status: MirrorStatus) -> None:
        self.status = status
        with suppress(VmferryError):
            self._changed(status)
