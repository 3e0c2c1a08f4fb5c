"""The verbs, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from . import (
    convert,
    demo,
    inspect,
    migrate,
    owner,
    receive,
    restore,
    run,
    schema,
    send,
    serve,
    status,
)

# Without rich: its import alone costs more than all the rest of --help.
app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit status: 0 done, 2 wrong usage, 3 bad stream, 4 peer or network, 5 files, 1 a bug "
    "in vmferry: VMFERRY_DEBUG=1 shows more of it.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from vmferry import __version__

        typer.echo(f"vmferry {__version__}")
        raise typer.Exit


@app.callback()
def vmferry(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Save a running QEMU machine to disk, see what is in it, and resume it."""


for _verb, _module, _help in (
    ("receive", receive, "Save the machine that a QEMU migrates to here."),
    ("send", send, "Resume a saved machine in a QEMU that waits for it."),
    ("serve", serve, "Serve memory to machines that are restored."),
    ("inspect", inspect, "See what is in a stream or a saved machine."),
    ("run", run, "Host a machine of vmferry's own."),
    ("migrate", migrate, "Have a running machine migrate, and watch it."),
    ("status", status, "See what a running machine does, and how far its migration is."),
    ("demo", demo, "Move a running machine between two processes, and prove that it is intact."),
    ("convert", convert, "Make a memory image, a core file or a stream of it."),
):
    app.command(_verb, short_help=_help)(_module.command)
app.command(
    "restore",
    short_help="Run a saved machine at once in a QEMU; its memory follows.",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
)(restore.command)
app.add_typer(schema.verbs, name="schema", short_help="Compare the device state of programs.")
app.add_typer(owner.verbs, name="owner", short_help="See and settle who may run a machine.")
