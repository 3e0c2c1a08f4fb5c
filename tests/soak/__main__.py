"""``make soak``: 200 moves on KVM where there is one, and 200 on the Unicorn emulator.

And on each half as many by postcopy, where the connection and the pager are lost by chance; and
half as many of a guest that keeps its journal on a shared raw image, and on a shared qcow2 image.
After each move the image is checked, and the journal read, by QEMU.  And each of three saved
guests, a Linux among them, is restored into QEMU 50 times in a row.

``SOAK_MOVES`` is another number, ``SOAK_KINDS`` other kinds of machines (``auto unicorn mixed``)
and images (``raw qcow2``), or ``restores``; ``SOAK_SEED`` makes the same choices again.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random

from tests.machines.hosted import MIB, Hosted, config
from tests.machines.lazily import Waiting, restore_with_losses, saved
from tests.soak.journey import Journey
from tests.soak.restores import restores
from vmferry.machines import usable_kind

_LEAST, _MOST = 5, 25
"""Moves of one guest."""

_IMAGES = frozenset({"raw", "qcow2"})
"""Formats of a shared image, in the place of a kind of machine."""


def main() -> int:
    """Run it all; the exit status is 0 if nothing was found."""
    seed = os.environ.get("SOAK_SEED") or secrets.token_hex(4)
    moves = int(os.environ.get("SOAK_MOVES") or 200)
    for kind in (os.environ.get("SOAK_KINDS") or "auto unicorn raw qcow2 restores").split():
        print(f"SOAK_SEED={seed} SOAK_MOVES={moves} SOAK_KINDS={kind}", flush=True)
        began = time.monotonic()
        if kind == "restores":
            for number, said in enumerate(restores(seed, moves // 4), 1):
                print(f"  {number:4} {said}", flush=True)
            took = f"{time.monotonic() - began:.0f} s"
            print(f"restores: {number} times, nothing wrong, in {took}", flush=True)
            continue
        is_image = kind in _IMAGES
        found = soak(seed, moves // 2 if is_image else moves, kind)
        told = ", ".join(f"{count} {status}" for status, count in sorted(found.items()))
        print(f"{kind}: {told}, nothing wrong, in {time.monotonic() - began:.0f} s", flush=True)
        if is_image:
            continue
        began = time.monotonic()
        losses = restore_lazily(seed, moves // 2, kind)
        took = f"{time.monotonic() - began:.0f} s"
        print(f"{kind}: {moves // 2} by postcopy, {losses} losses, nothing wrong, in {took}")
    return 0


def soak(seed: str, moves: int, kind: str) -> Counter[str]:
    """Move guests until *moves* have arrived; how many attempts ended how."""
    found: Counter[str] = Counter()
    number = arrived = 0
    while arrived < moves:
        number += 1
        rng = Random(f"{seed} {kind} {number}")
        goal = min(arrived + rng.randint(_LEAST, _MOST), moves)
        with tempfile.TemporaryDirectory(prefix="vmferry-soak-") as directory:
            host, form = ("auto", kind) if kind in _IMAGES else (kind, None)
            journey = Journey(rng, host, Path(directory), form=form)
            arrived = _travel(journey, found, arrived, goal)
    return found


def restore_lazily(seed: str, moves: int, kind: str) -> int:
    """Let guests come by postcopy, and lose it by chance; how often it was lost."""
    losses = move = 0
    while move < moves:
        rng = Random(f"{seed} {kind} postcopy {move}")
        host = usable_kind() if kind in {"auto", "mixed"} else kind
        machine = config(
            host,
            ram=rng.choice([16, 32, 64]) * MIB,
            working_set=rng.choice([4, 6, 8]) * MIB,
            cpus=rng.choice([1, 2]),
            hot=rng.choice([0.1, 0.5, 1.0]),
        )
        with tempfile.TemporaryDirectory(prefix="vmferry-soak-") as home, ExitStack() as stack:
            checkpoint = saved(Hosted(machine, stack), Path(home), stack)
            for _ in range(min(10, moves - move)):
                preempt = rng.random() < 0.5
                names = ["postcopy-preempt"] if preempt else []
                with tempfile.TemporaryDirectory(dir=home) as place, ExitStack() as its:
                    there = Waiting(Hosted(machine, its), its, *names)
                    losses += restore_with_losses(checkpoint, there, Path(place), rng, preempt)
                    there.is_whole()
                move += 1
                print(f"  {move:4} by postcopy, {losses} losses", flush=True)
    return losses


def _travel(journey: Journey, found: Counter[str], arrived: int, goal: int) -> int:
    print(f"  {journey.config}", flush=True)
    with journey:
        for move in journey.moves():
            found[move.status] += 1
            arrived += move.has_arrived
            print(f"  {arrived:4} {move}", flush=True)
            if arrived == goal:
                break
        print(f"       {journey.finish()} heartbeats in one row", flush=True)
    return arrived


if __name__ == "__main__":
    sys.exit(main())
