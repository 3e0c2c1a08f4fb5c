"""``vmferry restore``: run a saved machine at once, its memory follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Bandwidth, Json, Quiet

if TYPE_CHECKING:
    from .signals import Work


def command(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIRECTORY", help="A checkpoint.")],
    uri: Annotated[
        str | None,
        typer.Argument(
            metavar="[URI]",
            help="Where QEMU waits, or with --qmp is to wait: tcp:HOST:PORT, unix:PATH. Without "
            "it, give the command that starts QEMU behind --.",
        ),
    ] = None,
    lazy: Annotated[
        bool,
        typer.Option(
            "--lazy/--whole",
            help="Run the machine at once and send its memory as it is asked for; or send all "
            "first, as vmferry send does.",
        ),
    ] = True,
    qmp: Annotated[
        str | None,
        typer.Option(
            metavar="SOCKET",
            help="The monitor of the QEMU that waits: it is checked, made to listen at URI, and "
            "watched until it runs.",
        ),
    ] = None,
    preempt: Annotated[
        bool,
        typer.Option(
            "--preempt",
            help="Send urgent pages through a channel of their own (capability postcopy-preempt, "
            "QEMU 7.1).",
        ),
    ] = False,
    page_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="BLOCK=SIZE",
            help="QEMU backs this RAM block with huge pages; with --qmp that is asked for.",
        ),
    ] = None,
    bandwidth: Bandwidth = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on where an earlier restore was broken off: QEMU runs the machine, its "
            "migration is postcopy-paused, and it listens again (migrate-recover).",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold each page against its checksum.")
    ] = False,
    working_set: Annotated[
        bool,
        typer.Option(
            "--working-set/--no-working-set",
            help="Send first what was wanted first in earlier restores, and note what is wanted.",
        ),
    ] = True,
    background: Annotated[
        bool,
        typer.Option(
            "--background", help="Return once the machine runs, and leave a process that serves it."
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="SOCKET", help="Have the page server there do it (vmferry serve DIRECTORY)."
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="How long QEMU may read nothing, or load; 0 for ever."
        ),
    ] = 60.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the saved machine in DIRECTORY in a QEMU, at once: its memory follows.

    QEMU must have been started as the saved machine was, with -incoming. DIRECTORY does not change
    and can be restored any number of times. Until QEMU has everything, its machine depends on this
    command: if it dies, the machine freezes until --resume.

    Behind -- stands a command that starts QEMU, such as qemu-system-x86_64 with its options:
    -incoming is added, and the command ends when QEMU does.
    """
    from vmferry import UsageError
    from vmferry.checkpoint.order import Order
    from vmferry.migration.postcopy.source import LazyOptions

    from .reports import Done, reporter
    from .restoring import Wanted, restored, sizes_of, summary
    from .signals import Interrupted, supervised
    from .views import Moving

    options = LazyOptions(
        preempt=preempt,
        page_sizes=sizes_of(page_size or []),
        bandwidth=bandwidth,
        idle=timeout or None,
        answer=timeout or None,
        resume=resume,
    )
    # What stands behind -- comes as arguments too, the first one in the place of the URI.
    program = [uri, *context.args] if uri is not None and (context.args or ":" not in uri) else []
    if uri is None:
        raise UsageError("expected either a URI or the command that starts QEMU, behind --")
    if program and not context.args and (qmp is not None or resume):
        raise UsageError(f"expected unix:PATH or tcp:HOST:PORT as URI, found {uri}")
    if program and (qmp is not None or resume):
        raise UsageError("--qmp and --resume are for a QEMU that is there, found a command as well")
    following = {
        "--server": server,
        "--qmp": qmp,
        "--preempt": preempt,
        "--page-size": page_size,
        "--bandwidth": bandwidth,
        "--resume": resume,
        "--verify": verify,
        "--background": background,
    }
    if not lazy and (found := next((name for name, value in following.items() if value), None)):
        raise UsageError(
            f"expected {found} for a machine whose memory follows, found --whole and {found}"
        )
    if background and (server is None or program):
        from .background import leave_behind

        return leave_behind(json=json, quiet=quiet)
    order = Order(uri=uri, qmp=qmp, options=options, verify=verify, learn=working_set)
    wanted = Wanted(directory, order, lazy, program, server, background, json)

    def work(control: Work) -> dict[str, Any] | None:
        return restored(wanted, report, control)

    with reporter(Moving(), json=json, quiet=quiet) as report:
        try:
            outcome = supervised(work)
        except Interrupted as interrupted:
            if interrupted.is_left:
                interrupted.consequence = (
                    "the machine runs, and freezes where it needs memory that it does not have:"
                    " --resume goes on"
                )
            elif server is not None and not program:
                interrupted.consequence = "the page server goes on with it"
            raise
        if outcome is None:
            report.finished(Done(f"sent {directory}", {"directory": str(directory)}))
            return None
        said = (
            summary(outcome) if "requests" in outcome else "running; the page server does the rest"
        )
        report.finished(Done(f"restored {directory}: {said}", outcome))
    return None
