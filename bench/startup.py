"""How long it takes until anything happens: importing, and ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from bench.measure import Row, Samples, Target, milliseconds
from bench.places import Places
from bench.processes import run, vmferry

_ROUNDS = 10


def rows(_where: Places, *, rounds: int, quick: bool) -> Iterator[Row]:
    """Every row of this page, each a process from its start to its end."""
    shown = {
        "python": ("Python by itself", [sys.executable, "-c", ""], None),
        "import": ("import vmferry", [sys.executable, "-c", "import vmferry"], 150),
        "help": ("vmferry --help", vmferry("--help"), 300),
        "receive": ("vmferry receive --help", vmferry("receive", "--help"), None),
    }
    times = rounds if quick else _ROUNDS
    samples = Samples(
        {case: partial(run, command) for case, (_, command, _) in shown.items()}, times
    )
    for case, (what, _, most) in shown.items():
        target = Target(most, most=True) if most else None
        yield samples.row(f"startup/{case}", what, "ms", case, milliseconds("seconds"), target)
