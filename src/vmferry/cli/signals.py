"""Ctrl-C and its kin: the main thread learns of them, and the work is told to stop.

Whoever is in the middle of a migration is not torn out of it: it runs in a thread of its own and is
cancelled, so that the source hears of it and what was begun is removed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import FrameType
from typing import Final, Protocol, TypeVar

T = TypeVar("T")

_SIGNALS: Final = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


_LONGEST: Final = 0.1
"""Seconds that the main thread waits at once."""


class Interrupted(BaseException):
    """A signal came.

    ``consequence`` says what became of the work, where that is not nothing.  ``is_left`` says that
    the work did not stop and has to be left behind.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_SIGNALS[signal.Signals(number)])
        self.exit_status = 128 + number
        self.consequence = ""
        self.is_left = False

    def __str__(self) -> str:
        return "; ".join(part for part in (self.args[0], self.consequence) if part)


@contextmanager
def raising_signals() -> Iterator[None]:
    """Within, a signal that asks to stop raises :class:`Interrupted` in the main thread.

    Behind, it is ignored: the work is done, and the status is to say so.
    """
    _handle(_raise)
    try:
        yield
    finally:
        _handle(signal.SIG_IGN)


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Give signals this handler, but those that the process was started to ignore.

    So are those of ``nohup`` and of a job in the background; they stay ignored.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


class Cancellable(Protocol):
    """A migration."""

    def cancel(self) -> object:
        """End it, from any thread."""


class Work:
    """What :func:`supervised` runs, as it can be stopped: from when it is *begun* with a target."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._target: Cancellable | None = None
        self._unwanted = False

    def begun(self, target: Cancellable) -> None:
        """From now on *target* can be cancelled; it is at once where that was asked before."""
        with self._lock:
            self._target = target
            unwanted = self._unwanted
        if unwanted:
            target.cancel()

    def cancel(self) -> None:
        """Stop it, now or when it is begun."""
        with self._lock:
            self._unwanted = True
            target = self._target
        if target is not None:
            target.cancel()


def supervised(run: Callable[[Work], T], *, patience: float | None = None) -> T:
    """What *run* returns or raises, called in a thread of its own.

    A signal cancels the work and is raised when it has stopped, from the error that it stopped
    with.  It is ignored where it comes too late, and from then on, so that the verb can say how the
    work went.  After a second signal, or *patience* seconds, the work is left behind.
    """
    work = Work()
    outcome: Future[T] = Future()
    # What a signal handler may call at any moment, unlike locks.
    news: SimpleQueue[Interrupted | None] = SimpleQueue()

    def carry_out() -> None:
        try:
            outcome.set_result(run(work))
        except BaseException as error:  # noqa: BLE001 - raised again by the main thread
            outcome.set_exception(error)
        news.put(None)

    _handle(lambda number, _frame: news.put(Interrupted(number)))
    Thread(target=carry_out, daemon=True).start()
    interrupted = _next(news)
    if interrupted is not None:
        work.cancel()
        if not _stops(news, patience):
            interrupted.is_left = True
            raise interrupted
        if (error := outcome.exception()) is not None:
            raise interrupted from error
    return outcome.result()


def _stops(news: SimpleQueue[Interrupted | None], patience: float | None) -> bool:
    """Whether the next thing to hear of is that the work has stopped."""
    try:
        return _next(news, patience) is None
    except Empty:
        return False


def _next(
    news: SimpleQueue[Interrupted | None], patience: float | None = None
) -> Interrupted | None:
    """Wait for news, *patience* seconds at most; raises ``Empty`` behind.

    A signal that comes in just before a wait does not end it, and its handler runs only after it:
    so no single wait is long.
    """
    deadline = None if patience is None else time.monotonic() + patience
    while True:
        left = _LONGEST if deadline is None else min(_LONGEST, deadline - time.monotonic())
        with suppress(Empty):
            return news.get(timeout=max(left, 0))
        if deadline is not None and time.monotonic() >= deadline:
            raise Empty
