"""``vmferry receive``: be the destination of a migration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Accept, Json, MaxRam, PageSize, Quiet, tolerated

if TYPE_CHECKING:
    from vmferry import Checkpoint
    from vmferry.migration.destination import Destination

    from .signals import Work


_FIRST = 30.0
"""Seconds to wait for the first bytes of a connection, unless all waits are to be shorter."""


def command(
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="Where to listen, as QEMU writes it: tcp:HOST:PORT (port 0 for a free one), "
            "unix:PATH, fd:NUMBER, exec:COMMAND, file:PATH[,offset=BYTES], - for standard input.",
        ),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIRECTORY", help="The new directory for the checkpoint.")
    ],
    max_ram: MaxRam = None,
    page_size: PageSize = None,
    accept: Accept = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="How long the source may say nothing; 0 for ever."
        ),
    ] = 60.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Be the destination of a migration: save the machine that comes to URI in DIRECTORY.

    The source needs no special settings, and nothing here has to match its capabilities. In QEMU's
    monitor: migrate -d unix:/tmp/vm
    """
    from vmferry import Deadlines, receive

    from .reports import moved, reporter
    from .signals import Interrupted, supervised
    from .views import Moving

    def work(control: Work) -> Checkpoint:
        def started(destination: Destination) -> None:
            control.begun(destination)
            report.listening(destination.address)

        return receive(
            uri,
            directory,
            progress=report.progress,
            max_ram=max_ram,
            page_size=page_size,
            tolerate=tolerated(accept),
            deadlines=Deadlines(first=min(timeout, _FIRST) or None, idle=timeout or None),
            started=started,
        )

    with reporter(Moving(), json=json, quiet=quiet) as report:
        try:
            with supervised(work) as checkpoint:
                machine = checkpoint.manifest.machine
        except Interrupted as interrupted:
            interrupted.consequence = (
                f"{directory} may be left incomplete"
                if interrupted.is_left
                else "nothing was kept, the machine is still the source's"
            )
            raise
        report.finished(moved("received", machine, uri, str(directory), report.last))
