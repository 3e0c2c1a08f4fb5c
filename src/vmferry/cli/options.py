"""Options that several verbs have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from vmferry.errors import UsageError
from vmferry.units import parse_rate, parse_size

if TYPE_CHECKING:
    from vmferry import Tolerate


class Accepted(StrEnum):
    """What is refused unless it is asked for."""

    NO_RAM = "no-ram"
    NO_END = "no-end"


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
Accept = Annotated[
    list[Accepted] | None,
    typer.Option(
        metavar="no-ram|no-end",
        help="Accept a stream without guest memory, or one in which a section never ends, "
        "as in a background snapshot. May be repeated.",
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
Ram = Annotated[
    int | None,
    typer.Option(
        parser=_read(parse_size),
        metavar="SIZE",
        help="The memory of the machine. Default: 256MiB.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Show progress and the result as one JSON object a line.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]


def tolerated(accepted: Iterable[Accepted] | None) -> Tolerate:
    """What ``--accept`` means to those who read a stream."""
    from vmferry import Tolerate

    tolerate = Tolerate.NOTHING
    for what in accepted or ():
        tolerate |= Tolerate[what.name]
    return tolerate
