"""``python -m bench``: measure, and print the tables.

The exit status is 1 where something could not be measured; a missed target is for people to judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import (
    dirty,
    images,
    inspect,
    kernels,
    live,
    receive,
    restore,
    send,
    startup,
    state,
    xbzrle,
)
from bench.measure import Row, Unmeasured
from bench.places import Places, machine, places
from bench.table import problems, table

_SCHEMA = 1
_PAGES = {
    "startup": startup.rows,
    "inspect": inspect.rows,
    "receive": receive.rows,
    "send": send.rows,
    "live": live.rows,
    "restore": restore.rows,
    "state": state.rows,
    "images": images.rows,
    # Last, for their arrays: the memory of a process counts in the peak of those it starts.
    "kernels": kernels.rows,
    "xbzrle": xbzrle.rows,
    "dirty": dirty.rows,
}


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=_PAGES, help="this page; may be repeated"
    )
    parser.add_argument("--quick", action="store_true", help="small guests: does it run at all?")
    parser.add_argument("--rounds", type=int, help="how often each is measured (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to FILE")
    wanted = parser.parse_args()
    rounds = wanted.rounds or (1 if wanted.quick else 5)
    with places() as where:
        facts = machine(where) | {"rounds": rounds, "quick": wanted.quick}
        print(", ".join(f"{key} {value}" for key, value in facts.items()), "\n")
        rows: list[Row] = []
        for name in wanted.only or _PAGES:
            found = list(_rows(name, _PAGES[name], where, rounds=rounds, quick=wanted.quick))
            print(*table(found), "", *problems(found), sep="\n", flush=True)
            rows += found
    if wanted.json:
        content = {"schema": _SCHEMA, "machine": facts, "rows": [row.to_json() for row in rows]}
        wanted.json.write_text(json.dumps(content, indent=1) + "\n")
    missed = [row.what for row in rows if row.is_met is False]
    print("targets missed:", "; ".join(missed) or "none")
    return int(any(row.error for row in rows))


def _rows(
    name: str, page: Callable[..., Iterator[Row]], where: Places, *, rounds: int, quick: bool
) -> Iterator[Row]:
    """The rows of a page; one that says why, where it cannot begin."""
    try:
        yield from page(where, rounds=rounds, quick=quick)
    except Exception as error:  # noqa: BLE001 - the other pages can still be measured
        yield Row(name, f"{name}: the rest", "", error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Unmeasured as error:
        sys.exit(f"bench: {error}")
