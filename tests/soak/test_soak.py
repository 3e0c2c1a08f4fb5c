"""The short form of ``make soak``: a guest that moves six times, by chance but always the same."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest

from tests.machines.hosted import KINDS
from tests.soak.journey import Journey

MOVES = 6


@pytest.mark.parametrize("kind", KINDS)
def test_guest_is_intact_wherever_it_has_been(kind: str, tmp_path: Path) -> None:
    """So is its journal, behind each move, on an image that all the processes share."""
    form = "raw" if kind == "unicorn" else "qcow2"
    journey = Journey(Random(f"vmferry {kind}"), kind, tmp_path, form=form)
    with journey:
        arrivals = (move for move in journey.moves() if move.has_arrived)
        for move in islice(arrivals, MOVES):
            print(move)
        assert journey.finish() > MOVES
