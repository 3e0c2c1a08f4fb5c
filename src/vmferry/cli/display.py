"""Progress on a terminal: one line that fits it, whatever its width."""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vmferry.migration.progress import Progress

from .output import say
from .reports import Done, Reporter, greeting, parts, share

_BAR: Final = 20
_PHASE: Final = 7
"""Columns of the bar and of the phase."""
_ROOM: Final = 68
"""Columns behind the phase from which on there is room for more than the numbers."""


class Display(Reporter):
    """A line that is drawn again and again, and is gone in the end."""

    def __init__(self) -> None:
        super().__init__()
        self._is_over = False
        self._live = Live(
            _Line(self), console=Console(stderr=True), refresh_per_second=8, transient=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over = True
        self._live.stop()
        super().__exit__(kind, error, trace)

    def listening(self, address: str) -> None:
        """The source may connect now."""
        say(greeting(address))

    def progress(self, now: Progress) -> None:
        """So far it got."""
        super().progress(now)
        if now.transferred and not self._is_over:
            self._live.start()

    def finished(self, done: Done) -> None:
        """It is done."""
        self._live.stop()
        say(done.text)


class _Line:
    """The latest progress, as it is when it is drawn."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        now = self._display.last
        row = Table.grid(padding=(0, 1))
        cells: list[Text | ProgressBar] = [Text(now.phase.ljust(_PHASE), style="bold")]
        room = options.max_width - _PHASE - 1 - len("^C")  # with that on it, it is still one line
        if room >= _ROOM:
            room -= _BAR + 1
            cells.append(ProgressBar(total=1.0, completed=share(now), width=_BAR))
        row.add_row(*cells, Text(_fitting(parts(now), room)))
        yield row


def _fitting(said: list[str], room: int) -> str:
    """As many of the parts as fit."""
    line = ""
    for part in said:
        longer = f"{line}  {part:>10}" if line else f"{part:>10}"
        if len(longer) > room:
            break
        line = longer
    return line
