"""What verbs show while they work: a display, plain lines, JSON, or nothing.

Progress goes to standard error, the result and whatever else a script may want to standard output.
``docs/inspect-json.md`` has the JSON.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, Self, TextIO

from vmferry.errors import UsageError, VmferryError
from vmferry.migration.progress import Progress
from vmferry.units import format_duration, format_rate, format_size

from .ending import judged
from .output import is_terminal, name, say, silence
from .views import T, View, rounded

_EVERY: Final = 1.0
"""Seconds between two plain lines."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of it: a line for people, and plain data."""

    text: str
    content: dict[str, Any]


def moved(
    verb: str, machine: str | None, source: str, target: str, last: Progress, note: str = ""
) -> Done:
    """What became of a migration: *verb* in the past tense, *note* is what else there is."""
    rate = last.transferred / last.elapsed if last.elapsed else 0.0
    text = (
        f"{verb} {name(machine) if machine else 'a machine'} with {format_size(last.ram_total)}"
        f" of RAM to {name(target)}: {format_size(last.transferred)} in"
        f" {format_duration(last.elapsed)}, {format_rate(rate)}{note}"
    )
    content = {
        "machine": machine,
        "source": source,
        "target": target,
        "ram_total": last.ram_total,
        "transferred": last.transferred,
        "elapsed": last.elapsed,
        "rate": rate,
    }
    return Done(text, rounded(content))


class Reporter(Generic[T]):
    """Says nothing, as for ``--quiet``; but remembers how far it got, in ``last``.

    A context manager around the work.  :meth:`progress` is called from its threads.
    """

    def __init__(self, view: View[T]) -> None:
        self.view = view
        self.last = view.first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.failed(error)

    def listening(self, address: str) -> None:
        """The source may connect now."""

    def happened(self, event: str, text: str, **content: Any) -> None:
        """Something else to hear of: for people *text*, for programs *event* with its *content*."""

    def progress(self, now: T) -> None:
        """So far it got."""
        if self.view.phase(now) != "failed":
            self.last = now

    def finished(self, done: Done) -> None:
        """It is done."""

    def failed(self, error: BaseException) -> None:
        """It went wrong; whoever ends the command says why."""


class Lines(Reporter[T]):
    """A line about once a second, and one for what happens, to *out*."""

    def __init__(self, view: View[T], out: TextIO) -> None:
        super().__init__(view)
        self._out = out
        self._due = time.monotonic() + _EVERY

    def listening(self, address: str) -> None:
        """The source may connect now."""
        say(greeting(address), self._out)

    def happened(self, event: str, text: str, **content: Any) -> None:  # noqa: ARG002
        """Something else to hear of."""
        say(text, self._out)

    def progress(self, now: T) -> None:
        """So far it got."""
        super().progress(now)
        if self.view.is_shown(now) and time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            with suppress(OSError):  # nobody listens
                say(self.view.line(now), sys.stderr)

    def finished(self, done: Done) -> None:
        """It is done."""
        say(done.text, self._out)


class JsonLines(Reporter[T]):
    """One JSON object a line: the progress, and the result or what went wrong at the end."""

    def __init__(self, view: View[T], out: TextIO) -> None:
        super().__init__(view)
        self._out = out

    def _event(self, event: str, content: dict[str, Any]) -> None:
        say(json.dumps({"event": event} | content), self._out)

    def listening(self, address: str) -> None:
        """The source may connect now."""
        self._event("listening", {"address": address})

    def happened(self, event: str, text: str, **content: Any) -> None:  # noqa: ARG002
        """Something else to hear of."""
        self._event(event, content)

    def progress(self, now: T) -> None:
        """So far it got."""
        super().progress(now)
        try:
            self._event("progress", self.view.content(now))
        except OSError:  # a full disk is no reason to break a migration off
            silence(self._out)

    def finished(self, done: Done) -> None:
        """It is done."""
        self._event("result", {"ok": True} | done.content)

    def failed(self, error: BaseException) -> None:
        """It went wrong."""
        message, status = judged(error)
        content = {"kind": type(error).__name__, "message": message}
        if isinstance(error, VmferryError):
            content = error.to_json()
        with suppress(OSError):  # the error itself is the one to hear of
            self._event("result", {"ok": False, "error": content, "exit_status": status})


def reporter(view: View[T], *, json: bool, quiet: bool, out_is_stream: bool = False) -> Reporter[T]:
    """What was asked for; *out_is_stream* says that standard output carries the stream itself."""
    if json and quiet:
        raise UsageError("expected --json or --quiet, found both")
    out = sys.stderr if out_is_stream else sys.stdout
    if json:
        return JsonLines(view, out)
    if quiet:
        return Reporter(view)
    if is_terminal(sys.stderr):
        from .display import Display

        return Display(view, out)
    return Lines(view, out)


def greeting(address: str) -> str:
    """What is being waited for."""
    waits = address.startswith(("tcp:", "unix:"))
    return f"{'listening at' if waits else 'reading'} {name(address)}"
