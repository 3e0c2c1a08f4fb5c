"""``vmferry demo``: a running machine moves, and is proved to be intact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json, Ram

if TYPE_CHECKING:
    from vmferry.demo import Moved
    from vmferry.machines import MachineConfig


def command(
    ram: Ram = None,
    moves: Annotated[int, typer.Option(min=1, help="How often it moves.")] = 2,
    kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="What hosts it: kvm, unicorn, or auto for KVM where it works.",
        ),
    ] = "auto",
    disk: Annotated[
        bool,
        typer.Option("--disk", help="With a disk that all share, on which it keeps a journal."),
    ] = False,
    postcopy: Annotated[
        bool,
        typer.Option(
            "--postcopy", help="It goes before its memory, and asks for what it misses there."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Move a machine between processes of this computer while it runs, and prove it intact.

    Each process is one of vmferry run. It fails if anything is wrong with the machine.
    """
    from vmferry.demo import RAM, Moved, demonstrate

    from .demonstrating import Demonstrating, machine, moved, proof
    from .reports import reporter

    def told(what: MachineConfig | Moved) -> None:
        done = moved(what) if isinstance(what, Moved) else machine(what)
        report.happened("moved" if "move" in done.content else "machine", done.text, **done.content)

    with reporter(Demonstrating(), json=json, quiet=False) as report:
        report.finished(
            proof(
                demonstrate(
                    ram=ram or RAM,
                    moves=moves,
                    kind=kind,
                    disk=disk,
                    postcopy=postcopy,
                    told=told,
                    seen=report.progress,
                )
            )
        )
