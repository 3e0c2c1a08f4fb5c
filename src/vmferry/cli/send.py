"""``vmferry send``: be the source of a migration."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Bandwidth, Json, Quiet

if TYPE_CHECKING:
    from .signals import Work

_PATIENCE = 2.0
"""Seconds to wait for a connection attempt that cannot be cancelled, after ctrl-C."""


class Compression(StrEnum):
    """Methods of multifd."""

    ZLIB = "zlib"
    ZSTD = "zstd"


def command(
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A checkpoint.")],
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="Where QEMU waits with -incoming URI: tcp:HOST:PORT, unix:PATH; or fd:NUMBER, "
            "exec:COMMAND, file:PATH[,offset=BYTES], - for standard output.",
        ),
    ],
    multifd: Annotated[
        int,
        typer.Option(
            min=0,
            max=255,
            metavar="CHANNELS",
            help="Send pages through this many channels of their own (capability multifd).",
        ),
    ] = 0,
    compress: Annotated[
        Compression | None,
        typer.Option(metavar="zlib|zstd", help="Compress pages; needs --multifd."),
    ] = None,
    bandwidth: Bandwidth = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="How long the destination may read nothing, or take to load the machine; "
            "0 for ever.",
        ),
    ] = 60.0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every checksum of DIRECTORY first.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Be the source of a migration: a QEMU that waits at URI resumes the machine in DIRECTORY.

    Start it as the saved machine was started, with -incoming URI. DIRECTORY does not change and can
    be sent again.
    """
    from vmferry import Checkpoint, Method, SendOptions, send

    from .reports import moved, reporter
    from .signals import Interrupted, supervised
    from .views import Moving

    options = SendOptions(
        multifd=multifd,
        method=Method[compress.name] if compress else Method.NONE,
        bandwidth=bandwidth,
        idle=timeout or None,
        answer=timeout or None,
    )

    def work(control: Work) -> str | None:
        with Checkpoint(directory, verify=verify) as checkpoint:
            send(checkpoint, uri, options=options, progress=report.progress, started=control.begun)
            return checkpoint.manifest.machine

    with reporter(Moving(), json=json, quiet=quiet, out_is_stream=uri == "-") as report:
        try:
            machine = supervised(work, patience=_PATIENCE)
        except Interrupted as interrupted:
            if report.last.phase == "loading":
                interrupted.consequence = "the destination may have the machine already"
            raise
        note = "" if report.last.phase == "completed" else "; nobody says whether it was loaded"
        report.finished(moved("sent", machine, str(directory), uri, report.last, note))
