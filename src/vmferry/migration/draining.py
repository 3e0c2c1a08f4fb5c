"""Storage that does not answer when a machine is to leave it: nobody waits for that without end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final

from vmferry.errors import ChannelClosed, MachineError, StorageError, VmferryError
from vmferry.images import Image

_LOOK: Final = 0.05
"""Seconds between two looks at whether anybody waits for it still."""


def flush_all(images: Sequence[Image], patience: float | None, is_off: Callable[[], bool]) -> None:
    """Flush those that are active, within *patience* seconds; ``None`` for ever.

    Raises :func:`late` after that, :class:`ChannelClosed` where the migration *is_off* meanwhile,
    and what a flush raises.  A flush that was given up ends when its storage lets it, and keeps no
    other request of the image from being made.
    """
    active = [image for image in images if image.active]
    if not active:
        return None
    done = Future[None]()
    threading.Thread(target=_flush, args=(active, done), name="flush", daemon=True).start()
    began = time.monotonic()
    while True:
        try:
            return done.result(_LOOK)
        except TimeoutError:
            if is_off():
                raise ChannelClosed("the migration was cancelled on this side") from None
            if patience is not None and time.monotonic() - began > patience:
                raise late(active, patience) from None


def late(images: Sequence[Image], patience: float) -> VmferryError:
    """What to raise where a machine was not done with its *images* within *patience* seconds."""
    names = ", ".join(image.name for image in images if image.busy)
    if not names:
        return MachineError(f"the machine does not stand still within {patience:g} s")
    return StorageError(
        f"{names}: what the machine has asked for was not done within {patience:g} s"
        " (x-vmferry-drain-deadline): its storage does not answer"
    )


def _flush(images: Sequence[Image], done: Future[None]) -> None:
    try:
        for image in images:
            image.flush()
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        done.set_exception(error)
    else:
        done.set_result(None)
