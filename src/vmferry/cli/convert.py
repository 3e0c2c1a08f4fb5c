"""``vmferry convert``: bring a saved machine into a form that other tools read."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .options import Accept, Json, MaxRam, PageSize, Quiet, tolerated


class Form(StrEnum):
    """What there is to convert to."""

    RAW = "raw"
    ELF_CORE = "elf-core"
    STREAM = "stream"


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A file with a stream, - for standard input, or a checkpoint."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new file.")],
    to: Annotated[
        Form,
        typer.Option(
            metavar="raw|elf-core|stream",
            help="raw: physical memory as the machine sees it, in a sparse file. elf-core: a core "
            "file for gdb and volatility, with the registers of the CPUs. stream: for QEMU again.",
        ),
    ],
    max_ram: MaxRam = None,
    page_size: PageSize = None,
    accept: Accept = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the machine in SOURCE to the file OUT in another form.

    Where memory lies in the machine is known for the x86 machines pc, q35 and microvm.
    """
    from vmferry import convert

    from .output import name
    from .reports import Done, reporter
    from .signals import Interrupted
    from .views import Moving

    with reporter(Moving(), json=json, quiet=quiet) as report:
        try:
            exported = convert(
                source,
                to.value,
                out,
                progress=report.progress,
                max_ram=max_ram,
                page_size=page_size,
                tolerate=tolerated(accept),
            )
        except Interrupted as interrupted:
            # It appears when it is complete; had it been there before, that were another error.
            interrupted.consequence = f"{out} is complete" if out.exists() else "nothing was kept"
            raise
        left_out = [block.name for block in exported.left_out]
        text = f"wrote {out} ({to.value})"
        if left_out:
            text += f"; not in it: {', '.join(map(name, left_out))}"
        content = {"source": source, "target": str(out), "form": to.value, "left_out": left_out}
        report.finished(Done(text, content))
