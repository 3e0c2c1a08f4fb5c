"""Progress on a terminal: a line or two that fit it, whatever its width."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .reports import Done, Lines, Reporter
from .views import T, View

_BAR: Final = 20
_PHASE: Final = 7
"""Columns of the bar and of the phase."""
_ROOM: Final = 68
"""Columns behind the phase from which on there is room for more than the numbers."""


class Display(Lines[T]):
    """Lines that are drawn again and again, and are gone in the end."""

    def __init__(self, view: View[T], out: TextIO) -> None:
        super().__init__(view, out)
        self._is_over = False
        self._live = Live(
            _Rows(self), console=Console(stderr=True), refresh_per_second=8, transient=True
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

    def happened(self, event: str, text: str, **content: Any) -> None:
        """Something else to hear of, above what is drawn."""
        if self._live.is_started:
            self._live.console.print(Text(text))
        else:
            super().happened(event, text, **content)

    def progress(self, now: T) -> None:
        """So far it got."""
        Reporter.progress(self, now)  # without the line of a log
        if self.view.is_shown(now) and not self._is_over:
            self._live.start()

    def finished(self, done: Done) -> None:
        """It is done."""
        self._live.stop()
        super().finished(done)


class _Rows:
    """The latest progress, as it is when it is drawn."""

    def __init__(self, display: Display[Any]) -> None:
        self._display = display

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        now, view = self._display.last, self._display.view
        phase = view.phase(now).ljust(_PHASE)
        indent = len(phase) + 1
        room = options.max_width - indent - len("^C")  # with that on it, it is still one line
        first, *others = view.rows(now)
        row = Table.grid(padding=(0, 1))
        cells: list[Text | ProgressBar] = [Text(phase, style="bold")]
        left = room
        if room >= _ROOM:
            left -= _BAR + 1
            cells.append(ProgressBar(total=1.0, completed=view.share(now), width=_BAR))
        row.add_row(*cells, Text(_fitting(first, left)))
        yield row
        for other in others:
            yield Text(" " * indent + _fitting(other, room))


def _fitting(said: list[str], room: int) -> str:
    """As many of the parts as fit."""
    line = ""
    for part in said:
        longer = f"{line}  {part:>10}" if line else f"{part:>10}"
        if len(longer) > room:
            break
        line = longer
    return line
