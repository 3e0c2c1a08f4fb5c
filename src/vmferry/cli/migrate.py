"""``vmferry migrate``: have a running machine migrate, and watch it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Monitor, Quiet

if TYPE_CHECKING:
    from vmferry.qemu import MigrationInfo

    from .signals import Work

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
    copy_storage: Annotated[
        bool,
        typer.Option(
            "--copy-storage",
            help="Copy the disks first, by mirrors over NBD that last until the switchover (QEMU).",
        ),
    ] = False,
    destination_qmp: Annotated[
        str | None,
        typer.Option(metavar="SOCKET", help="The monitor of the other machine, to copy disks."),
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
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Have the machine behind the monitor SOCKET migrate to URI while it runs.

    It is a QEMU or a machine of vmferry run. The other one waits at URI, and has the same
    capabilities. Ctrl-C cancels the migration: the machine runs on where it is.
    """
    from contextlib import ExitStack

    from vmferry.qemu import Migration, Qmp
    from vmferry.qemu.mirror import Both, Copied, StorageCopy, nbd_place
    from vmferry.units import format_size

    from .migrating import Migrating, taken
    from .output import one_line
    from .reports import Done, reporter
    from .signals import Interrupted, supervised

    if copy_storage != (destination_qmp is not None):
        raise typer.BadParameter("--copy-storage and --destination-qmp belong together")
    if copy_storage and not watch:
        raise typer.BadParameter("--copy-storage has to watch the migration")
    capabilities = dict(map(_capability, capability or []))
    parameters = dict(map(_parameter, parameter or []))

    def work(control: Work) -> MigrationInfo:
        with ExitStack() as stack:
            qmp = stack.enter_context(Qmp.connect(monitor))
            migration = Migration(qmp)
            if destination_qmp is None:
                control.begun(migration)
                migration.begin(uri, capabilities=capabilities, parameters=parameters)
                return migration.wait(seen) if watch else migration.look()
            other = stack.enter_context(Qmp.connect(destination_qmp))
            place = nbd or nbd_place(uri)
            copy = stack.enter_context(StorageCopy(qmp, other, place, incremental=incremental))
            control.begun(Both(copy, migration))
            copy.wait_ready(copied)
            migration.begin(
                uri,
                capabilities=capabilities,
                parameters=parameters,
                before_switchover=copy.finish,
            )

            def watched(now: MigrationInfo) -> None:
                copy.look()
                seen(now)

            return migration.wait(watched)

    def copied(now: Copied) -> None:
        content = {"done": now.done, "total": now.total}
        text = f"disks: {format_size(now.done)} of {format_size(now.total)} copied"
        report.happened("copied", text, **content)

    def seen(now: MigrationInfo) -> None:
        if now.stall and now.stall != report.last.stall:
            report.happened("stalled", one_line(now.stall), message=now.stall)
        report.progress(now)

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


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, found {text!r}")
    return name, value
