"""Options that several verbs have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from vmferry.errors import UsageError
from vmferry.units import parse_rate, parse_size


def _read(parse: Callable[[str], int]) -> Callable[[str], int]:
    def read(text: str) -> int:
        try:
            return parse(text)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None

    return read


Monitor = Annotated[
    str,
    typer.Argument(
        metavar="SOCKET",
        help="The machine's QMP socket: PATH, unix:PATH or tcp:HOST:PORT (with QEMU, its option "
        "-qmp unix:PATH,server=on,wait=off).",
    ),
]
MaxRam = Annotated[
    int | None,
    typer.Option(
        parser=_read(parse_size),
        metavar="SIZE",
        help="Refuse a guest with more memory than this, such as 64GiB. "
        "Default: the memory of this machine.",
    ),
]
PageSize = Annotated[
    int | None,
    typer.Option(
        parser=_read(parse_size),
        metavar="SIZE",
        help="The target's page where neither the stream nor the machine type tells.",
    ),
]
Bandwidth = Annotated[
    int | None,
    typer.Option(
        parser=_read(parse_rate),
        metavar="RATE",
        help="Send at most this much a second over all channels, such as 1GiB or 100MB/s.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Show progress and the result as one JSON object a line.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]
