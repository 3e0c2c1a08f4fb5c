"""``vmferry run``: host a machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final

import typer

from .options import Json, Quiet

if TYPE_CHECKING:
    from .signals import Work

_PATIENCE: Final = 10.0
"""Seconds that the machine gets to end, after a signal."""

_WORDS: Final = {
    "inmigrate": "waiting for a machine",
    "finish-migrate": "stopped to switch over",
    "postmigrate": "migrated away",
    "in-doubt": "in doubt whether the other side has the machine: if it has not, the command cont "
    "lets it run here",
}
_ENDS: Final = {
    "host-qmp-quit": "ended, as it was told to",
    "guest-shutdown": "ended, as its guest has",
}


def command(
    machine: Annotated[
        Path, typer.Argument(metavar="MACHINE", help="A TOML file that says what it is made of.")
    ],
    incoming: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Do not start the guest: wait at URI for a machine that migrates to here, or with "
            "defer for migrate-incoming.",
        ),
    ] = None,
    qmp: Annotated[
        Path | None,
        typer.Option(metavar="SOCKET", help="Be open to QMP at this path, as to vmferry migrate."),
    ] = None,
    serial: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-", help="Write what the guest says to a file, or to standard output."
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the machine in MACHINE until it ends, is told to by QMP, or a signal comes.

    After it has migrated away it is still there, stopped, as a QEMU would be.
    """
    from vmferry import MachineError
    from vmferry.machines import read_config
    from vmferry.qemu.hosting import SIGNAL, Host

    from .reports import Done, reporter
    from .signals import Interrupted, supervised
    from .views import Moving

    def tell(state: str) -> None:
        report.happened("state", _WORDS.get(state, state), state=state)

    def warn(message: str) -> None:
        report.happened("warning", f"warning: {message}", message=message)

    def work(control: Work) -> str:
        config = read_config(machine)
        with (
            _writer(serial) as feed,
            Host(config, incoming=incoming, monitor=qmp, serial=feed, warned=warn) as host,
        ):
            control.begun(host)
            if host.address is not None:
                report.listening(host.address)
            reason = host.wait(tell)
        if reason == SIGNAL:
            raise MachineError("the machine was stopped")
        return reason

    with reporter(Moving(), json=json, quiet=quiet, out_is_stream=serial == "-") as report:
        try:
            reason = supervised(work, patience=_PATIENCE)
        except Interrupted as interrupted:
            if interrupted.is_left:
                interrupted.consequence = "the machine does not stop and is left as it is"
            raise
        report.finished(Done(_ENDS.get(reason, reason), {"reason": reason}))


@contextmanager
def _writer(path: str | None) -> Iterator[Callable[[bytes], None] | None]:
    """What takes the output of the serial port."""
    from vmferry.qemu.writer import BackgroundWriter

    if path is None:
        yield None
        return
    with _opened(path) as file, BackgroundWriter(file) as writer:
        yield writer.feed


def _opened(path: str) -> BinaryIO:
    return os.fdopen(os.dup(1), "wb", 0) if path == "-" else Path(path).open("wb", 0)
