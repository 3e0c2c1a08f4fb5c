"""Ctrl-C and its kin: the main thread learns of them, and the work is told to stop.

Whoever is in the middle of a migration is not torn out of it: it runs in a thread of its own and is
cancelled, so that the source hears of it and what was begun is removed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Final, Protocol, TypeVar

T = TypeVar("T")

_SIGNALS: Final = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "hung up",
}


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

    def to_json(self) -> dict[str, str]:
        """As the method of :class:`~vmferry.errors.VmferryError`."""
        return {"kind": "Interrupted", "message": str(self)}


@contextmanager
def raising_signals() -> Iterator[None]:
    """Within, a signal that asks to stop raises :class:`Interrupted` in the main thread.

    One that this process was started to ignore (``nohup``, a job in the background) stays ignored.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    wanted = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in wanted:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in wanted:
            signal.signal(number, before[number])


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Interrupted(number)


class Cancellable(Protocol):
    """A migration."""

    def cancel(self) -> None:
        """End it, from any thread."""


class Work:
    """What :func:`supervised` runs, as it can be stopped: from when it is *begun* with a target."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
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

    A signal cancels the work and is raised when it has stopped, or not at all if it came too late.
    After a second signal, or *patience* seconds, the work is left behind.
    """
    work = Work()
    outcome: Future[T] = Future()
    thread = threading.Thread(target=_carry_out, args=(run, work, outcome), daemon=True)
    try:
        thread.start()
        return outcome.result()
    except Interrupted as interrupted:
        return _stop(work, outcome, patience, interrupted)


def _carry_out(run: Callable[[Work], T], work: Work, outcome: Future[T]) -> None:
    try:
        outcome.set_result(run(work))
    except BaseException as error:  # noqa: BLE001 - raised again by the main thread
        outcome.set_exception(error)


def _stop(work: Work, outcome: Future[T], patience: float | None, interrupted: Interrupted) -> T:
    try:
        work.cancel()
        failure = outcome.exception(patience)
    except (Interrupted, TimeoutError):
        interrupted.is_left = True
        raise interrupted from None
    if failure is None:
        return outcome.result()
    raise interrupted from None
