"""The rows as a table in Markdown, which is what ``docs/benchmarks.md`` shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.measure import Row

_HEAD = ("figure", "median", "lowest to highest", "unit", "target", "met")


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The lines of a table."""
    cells = [_HEAD, *map(_cells, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = [_line(row, widths) for row in cells]
    yield lines[0]
    yield "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    yield from lines[1:]


def problems(rows: Sequence[Row]) -> Iterator[str]:
    """What could not be measured, and why."""
    for row in rows:
        if row.error:
            yield f"not measured: {row.what}: {row.error}"


def _cells(row: Row) -> tuple[str, ...]:
    target = str(row.target) if row.target else ""
    if row.median is None:
        return (row.what, "-", "", row.unit, target, "not measured")
    spread = f"{_number(min(row.values))} to {_number(max(row.values))}"
    met = {True: "yes", False: "NO", None: ""}[row.is_met]
    return (row.what, _number(row.median), spread, row.unit, target, met)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [
        cell.rjust(width) if column in (1, 2) else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"
