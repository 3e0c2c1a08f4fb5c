"""How the progress of a verb is put into words; each kind of progress has its view."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final, Protocol, TypeVar

from vmferry.migration.progress import Progress
from vmferry.units import format_rate, format_size

T = TypeVar("T")

_LIVE: Final = frozenset({"remaining", "dirty_rate", "expected_downtime", "throttle"})


class View(Protocol[T]):
    """A kind of progress, for the eyes of people and of programs."""

    @property
    def first(self) -> T:
        """What it is before anything is known."""

    def is_shown(self, now: T) -> bool:
        """Whether there is anything to see yet."""

    def phase(self, now: T) -> str:
        """What is being done, in a word."""

    def share(self, now: T) -> float:
        """How much is done, from 0 to 1."""

    def rows(self, now: T) -> list[list[str]]:
        """What else there is to say, the most important first; the first row stands by the bar."""

    def line(self, now: T) -> str:
        """The same for a log."""

    def content(self, now: T) -> dict[str, Any]:
        """Plain data."""


class Moving:
    """Progress of a machine that this process receives, sends or writes."""

    first: Final = Progress("setup")

    def is_shown(self, now: Progress) -> bool:
        """Once its memory moves."""
        return now.transferred > 0 and now.phase in ("active", "device")

    def phase(self, now: Progress) -> str:
        """The phase."""
        return now.phase

    def share(self, now: Progress) -> float:
        """How much of guest memory has come once, or was written."""
        if not now.ram_total:
            return 0.0
        if now.round > 1:
            return 1.0
        pages = now.normal_pages + now.zero_pages
        return min(1.0, (pages * now.page_size or now.transferred) / now.ram_total)

    def rows(self, now: Progress) -> list[list[str]]:
        """One row."""
        said = [
            format_size(now.transferred),
            format_rate(now.rate),
            f"{self.share(now):.0%} of {format_size(now.ram_total)} RAM",
        ]
        if now.round > 1:
            said.append(f"round {now.round}")
        if now.normal_pages or now.zero_pages:
            said.append(f"{now.normal_pages:,} pages and {now.zero_pages:,} zero")
        return [said]

    def line(self, now: Progress) -> str:
        """The row."""
        return ", ".join(*self.rows(now))

    def content(self, now: Progress) -> dict[str, Any]:
        """Everything but what only a running machine has."""
        content = asdict(now)
        return rounded({key: content[key] for key in content if key not in _LIVE})


def rounded(content: dict[str, Any]) -> dict[str, Any]:
    """Without digits that mean nothing: seconds to the millisecond, whole bytes a second."""
    return content | {"elapsed": round(content["elapsed"], 3), "rate": round(content["rate"])}
