"""``vmferry migrate``: have a running machine migrate, and watch it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Monitor, Quiet

if TYPE_CHECKING:
    from vmferry.qemu import MigrationInfo
    from vmferry.qemu.postcopy import When

    from .signals import Work

_DIGITS = 9
"""Digits of a number of passes, at most."""

_PATIENCE = 10.0
"""Seconds that cancelling may take, after ctrl-C."""


def command(
    monitor: Monitor,
    uri: Annotated[
        str,
        typer.Argument(
            metavar="URI",
            help="Where the other machine waits, as the machine itself reads it: tcp:HOST:PORT, "
            "unix:PATH, ...",
        ),
    ],
    capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Turn a capability on, such as multifd or xbzrle; NAME=off turns one off. "
            "May be repeated.",
        ),
    ] = None,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Set a parameter, such as max-bandwidth=1GiB/s or downtime-limit=50ms. "
            "May be repeated.",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch/--no-watch", help="Wait for the end, or only begin. Default: wait."),
    ] = True,
    postcopy: Annotated[
        bool,
        typer.Option(
            "--postcopy",
            help="Let the machine go at once, its memory follows (capability postcopy-ram on both "
            "sides): for one that writes faster than its memory can be sent.",
        ),
    ] = False,
    postcopy_after: Annotated[
        str | None,
        typer.Option(
            metavar="ROUNDS|STALL",
            help="The same after so many passes over memory, or where there is no more progress.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a migration that is postcopy-paused: the other machine listens at URI "
            "again (migrate-recover; with --destination-qmp it is told to).",
        ),
    ] = False,
    copy_storage: Annotated[
        bool,
        typer.Option(
            "--copy-storage",
            help="Copy the disks first, by mirrors over NBD that last until the switchover.",
        ),
    ] = False,
    destination_qmp: Annotated[
        str | None,
        typer.Option(
            metavar="SOCKET",
            help="The monitor of the other machine, for --copy-storage, --resume, and --postcopy "
            "or --capability block: it is made to wait at URI with the same capability.",
        ),
    ] = None,
    nbd: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Where the other machine serves its disks meanwhile: unix:PATH or "
            "tcp:HOST:PORT. Default: beside URI, or port 10809 of its host.",
        ),
    ] = None,
    incremental: Annotated[
        bool,
        typer.Option(
            "--incremental", help="Copy only what lies above backing files that both sides have."
        ),
    ] = False,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Keep two QEMUs that share images to a record of who owns the machine, "
            "file:PATH: the other one runs when the record says that it may, and not before.",
        ),
    ] = None,
    settle: Annotated[
        bool,
        typer.Option(
            "--settle",
            help="With --record: end a move that was broken off. The machine runs afterwards "
            "where record and QEMUs say that it has to.",
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have the machine behind the monitor SOCKET migrate to URI while it runs.

    It is a QEMU or a machine of vmferry run. The other one waits at URI, and has the same
    capabilities. Ctrl-C cancels the migration: the machine runs on where it is.
    """
    from .leading import Wanted, carried_out
    from .migrating import Migrating, taken
    from .output import one_line
    from .reports import Done, reporter
    from .signals import Interrupted, supervised

    wanted = Wanted(
        monitor=monitor,
        uri=uri,
        capabilities=dict(map(_capability, capability or [])),
        parameters=dict(map(_parameter, parameter or [])),
        watch=watch,
        postcopy=_when("0" if postcopy and postcopy_after is None else postcopy_after),
        resume=resume,
        copy_storage=copy_storage,
        destination=destination_qmp,
        nbd=nbd,
        incremental=incremental,
        record=record,
        settle=settle,
    )
    if wrong := wanted.wrong():
        raise typer.BadParameter(wrong)

    def work(control: Work) -> MigrationInfo:
        return carried_out(wanted, report, control)

    with reporter(Migrating(), json=json, quiet=quiet) as report:
        try:
            info = supervised(work, patience=_PATIENCE)
        except Interrupted as interrupted:
            interrupted.consequence = (
                "cancelling takes long and is left to the machine"
                if interrupted.is_left
                else str(interrupted.__cause__)
            )
            raise
        begun = f"it migrates to {one_line(uri)}; vmferry status {one_line(monitor)} tells how far"
        text = f"migrated to {one_line(uri)}: {taken(info)}" if watch else begun
        report.finished(Done(text, {"target": uri} | info.to_json()))


def _capability(text: str) -> tuple[str, bool]:
    name, _, value = text.partition("=")
    if not name or value not in ("", "on", "off"):
        raise typer.BadParameter(f"expected NAME or NAME=off, found {text!r}")
    return name, value != "off"


def _when(text: str | None) -> When | None:
    from vmferry.qemu.postcopy import AfterRounds, AtStall

    if text is None:
        return None
    if text.upper() == "STALL":
        return AtStall()
    if not text.isdecimal() or len(text) > _DIGITS:
        raise typer.BadParameter(f"expected a number of rounds or STALL, found {text!r}")
    return AfterRounds(int(text))


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, found {text!r}")
    return name, value
