"""A restore that a page server carries out, as the command that asked for it sees it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from vmferry import PeerError, Progress, UsageError
from vmferry.checkpoint.order import Order
from vmferry.errors import ChannelClosed, printable
from vmferry.qemu.qmp import Qmp
from vmferry.transports.uri import DescriptorAddress, StandardStreams, UnixAddress, parse

from .reports import Reporter

_LOOK: Final = 0.05
"""Seconds between two looks at how far it is."""

Told = dict[str, Any]


class Delegated:
    """A restore of the checkpoint at *path* by the page server at the other end of *session*."""

    is_needed = False
    """Nobody depends on this command."""

    def __init__(self, session: Qmp, path: Path, report: Reporter[Progress]) -> None:
        self._session = session
        self._path = path
        self._report = report
        self._is_left = threading.Event()

    def cancel(self) -> bool:
        """Watch it no longer: it goes on."""
        self._is_left.set()
        return True

    def run(self, order: Order, *, background: bool) -> Told:
        """Have it done; return how it went, or in *background*, that the machine runs."""
        there = self._session.execute("query-checkpoint")
        if not _is_same(self._path, there):
            raise UsageError(f"the page server serves another checkpoint than {self._path}")
        number = self._session.execute("restore", _seen_from_anywhere(order).to_arguments())["id"]
        lost = ""
        while True:
            (told,) = self._session.execute("query-restores", {"id": number})
            now, status = _checked(told)
            self._report.progress(now)
            if not told["under-way"]:
                return _outcome(told)
            if (why := told.get("error-desc", "")) != lost:
                lost = why
                self._report.happened("paused", why, message=why)
            if background and status == "postcopy-active":
                return {"id": number}
            if self._is_left.wait(_LOOK):
                raise ChannelClosed("the page server goes on alone")


def _is_same(path: Path, there: object) -> bool:
    directory = there.get("directory") if isinstance(there, dict) else None
    try:
        return isinstance(directory, str) and Path(directory).samefile(path)
    except (OSError, ValueError):
        return False


def _checked(told: Any) -> tuple[Progress, str]:
    try:
        return Progress(**told["progress"]), str(told["status"])
    except (TypeError, KeyError) as error:
        raise PeerError(
            f"expected a restore of a page server, found {printable(repr(told), 200)}"
        ) from error


def _outcome(told: Told) -> Told:
    result = told.get("result")
    if isinstance(result, dict):
        return result
    raise PeerError(str(told.get("error-desc", "the page server does not say why it failed")))


def _seen_from_anywhere(order: Order) -> Order:
    """*order* as another process understands it."""
    uri, qmp = order.uri, order.qmp
    match parse(uri):
        case UnixAddress(path):
            uri = f"unix:{Path(path).absolute()}"
        case DescriptorAddress() | StandardStreams():
            raise UsageError(f"{printable(uri)} is of this process: a page server cannot use it")
    if qmp is not None and not qmp.startswith("tcp:"):
        qmp = str(Path(qmp.removeprefix("unix:")).absolute())
    return replace(order, uri=uri, qmp=qmp)
