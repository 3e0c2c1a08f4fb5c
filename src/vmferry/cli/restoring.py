"""What ``vmferry restore`` does: the QEMU that is started, and the restore itself."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vmferry import Checkpoint, SendOptions, UsageError, VmferryError, send
from vmferry.checkpoint.order import Order, is_page_size
from vmferry.checkpoint.restore import Restore
from vmferry.errors import PeerError, printable
from vmferry.qemu.process import ended
from vmferry.qemu.qmp import Qmp
from vmferry.units import parse_size

from .delegating import Delegated
from .reports import Reporter
from .signals import Work

_START: Final = 30.0
"""Seconds that QEMU may take to start."""

_STDERR: Final = 2

_END: Final = 10.0
"""Seconds that QEMU may take to end."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for on the command line."""

    directory: Path
    order: Order
    lazy: bool
    command: Sequence[str]
    server: str | None
    background: bool
    json: bool


def sizes_of(texts: Sequence[str]) -> dict[str, int]:
    """``BLOCK=SIZE`` as page sizes in bytes."""
    sizes = {}
    for text in texts:
        name, separator, size = text.rpartition("=")
        if not separator:
            raise UsageError(f"expected BLOCK=SIZE, found {printable(text)}")
        number = parse_size(size)
        if not is_page_size(number):
            raise UsageError(f"expected a power of two as the size of a page, found {size}")
        sizes[name] = number
    return sizes


def summary(result: dict[str, Any]) -> str:
    """How a restore went, for people; *result* as :meth:`Restored.to_json` has it."""
    after = result["time_to_running_ms"]
    running = "paused" if after is None else f"running after {after / 1e3:.3f} s"
    return (
        f"{running}, complete after {result['total_ms'] / 1e3:.2f} s;"
        f" {result['requests']} requests, {result['pages_sent']} pages sent"
    )


def restored(wanted: Wanted, report: Reporter[Any], control: Work) -> dict[str, Any] | None:
    """Restore, and where QEMU was started here, wait for its end; how it went."""
    with ExitStack() as cleanup:
        checkpoint = cleanup.enter_context(Checkpoint(wanted.directory))
        process, own = None, None
        if wanted.command:
            process, wanted = cleanup.enter_context(_started(wanted))
            control.begun(own := _Own(process))  # it may not even open its monitor
        order = wanted.order
        if not wanted.lazy:
            send(
                checkpoint,
                order.uri,
                options=SendOptions(idle=order.options.idle, answer=order.options.answer),
                progress=report.progress,
                started=control.begun,
            )
            outcome = None
        elif wanted.server is not None:
            session = cleanup.enter_context(Qmp.connect(wanted.server))
            delegated = Delegated(session, checkpoint.path, report)
            control.begun(_Dependable(delegated, report, own))
            outcome = delegated.run(order, background=wanted.background)
        else:
            qmp = None
            if order.qmp is not None:
                qmp = cleanup.enter_context(_monitor(order.qmp, process))
            work = order.restore(
                checkpoint, qmp, report.progress, lambda error: _tell_paused(report, error, own)
            )
            control.begun(_Dependable(work, report, own))
            outcome = work.run().to_json()
        if process is not None:
            process.wait()
        return outcome


class _Own:
    """The QEMU that was started here."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._is_unwanted = False

    @property
    def goes_on(self) -> bool:
        """Whether it runs, and is to."""
        return not self._is_unwanted and self._process.poll() is None

    def cancel(self) -> None:
        """End it."""
        self._is_unwanted = True
        ended(self._process, _END)


class _Dependable:
    """A restore that is not given up while a machine needs it, unless that is asked for twice."""

    def __init__(
        self,
        work: Restore | Delegated,
        report: Reporter[Any],
        own: _Own | None,
    ) -> None:
        self._work = work
        self._own = own
        self._report = report

    def cancel(self) -> None:
        if self._own is not None:
            # It is served meanwhile: while a processor of it waits for a page it does not end.
            self._own.cancel()
        elif self._work.is_needed:
            message = (
                "a machine runs that does not have all of its memory: this ends when it has, or at"
                " once when asked again"
            )
            self._report.happened("needed", message, message=message)
            return
        self._work.cancel()


def _tell_paused(report: Reporter[Any], error: Exception, own: _Own | None) -> None:
    if own is None or own.goes_on:
        report.happened("paused", f"{error}", message=str(error))


@contextmanager
def _started(wanted: Wanted) -> Iterator[tuple[subprocess.Popen[bytes], Wanted]]:
    with tempfile.TemporaryDirectory(prefix="vmferry-restore-") as place:
        monitor, uri = f"{place}/qmp", f"unix:{place}/incoming"
        more = ["-chardev", f"socket,id=vmferry-qmp,path={monitor},server=on,wait=off"]
        more += ["-mon", "chardev=vmferry-qmp,mode=control", "-incoming"]
        more += ["defer"] if wanted.lazy else [uri]
        try:
            # Whoever reads JSON does not want to read what QEMU says between.
            process = subprocess.Popen(
                [*wanted.command, *more], stdout=_STDERR if wanted.json else None
            )
        except OSError as error:
            raise UsageError(
                f"cannot start {printable(wanted.command[0])}: {error.strerror}"
            ) from error
        try:
            yield process, replace(wanted, order=replace(wanted.order, uri=uri, qmp=monitor))
        finally:
            if process.poll() is None:
                ended(process, _END)


@contextmanager
def _monitor(address: str, process: subprocess.Popen[bytes] | None) -> Iterator[Qmp]:
    deadline = time.monotonic() + (_START if process is not None else 0)
    while True:
        if process is not None and process.poll() is not None:
            raise PeerError(f"QEMU ended with status {process.returncode}; it says why itself")
        try:
            session = Qmp.connect(address)
        except VmferryError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
            continue
        with session:
            yield session
        return
