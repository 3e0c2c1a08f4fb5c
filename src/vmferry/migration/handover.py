"""Who may run the machine, at every step of giving it away and taking it.

Between two sides that can wait for a word::

    source                              destination
    STOPPED   the rest, end of stream
    OFFERED   ------------------------> loads, checks
              <------------------READY  READY
    GIVEN     GO ---------------------> TAKEN    runs
    RELEASED  <-------------------SHUT

A QEMU knows neither READY nor GO: it runs what it has loaded and says SHUT afterwards, so that the
end of the stream is the last word of its source (:data:`SOURCE_OF_QEMU`).

The laws, proved by a walk over everything the two sides can be in:

* Never do both sides run the machine, whatever is lost and whoever dies, whenever.
* A side that cannot know what became of the machine is *in doubt*: it does not run it and keeps all
  of it.  Silence, a broken connection and a deadline say nothing of the other side.
* While a side lives that holds the whole machine, and the other one is known to be out of it, the
  machine can run there.

A source moves to GIVEN *before* the first byte of its last word leaves, and to RESUMED before the
machine runs: whoever gets there first has decided a race between a cancel and the switchover.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Stage(StrEnum):
    """What a side may do with the machine.  The first eight are a source's."""

    PRECOPY = "precopy"
    """The machine is the source's, as before the migration; most of it was copied."""
    STOPPED = "stopped"
    """It is stopped, and the rest of it is being sent."""
    OFFERED = "offered"
    """All was sent; the destination has not said yet that it can run it."""
    GIVEN = "given"
    """The last word is on its way: from here on the destination may run the machine."""
    UNKNOWN = "unknown"
    """The connection was lost behind that.  In doubt: stopped, and kept."""
    RELEASED = "released"
    """The destination has said that it runs the machine.  Here it never runs again."""
    RESUMED = "resumed"
    """The migration is off, and the machine is the source's as it was before."""

    LOADING = "loading"
    """The destination has some of the machine."""
    READY = "ready"
    """It has all of it, has checked that, and has said so."""
    WAITING = "waiting"
    """The connection was lost behind that.  In doubt: not started, and kept."""
    TAKEN = "taken"
    """The machine is the destination's."""
    DISCARDED = "discarded"
    """It never ran here and never will."""


class Word(StrEnum):
    """What moves a side on: a step of its own, a word of the other side, or what became of it."""

    STOP = "stop"
    """Source: the machine was stopped for the switchover."""
    SENT = "sent"
    """Source: all that goes before its last word was sent."""
    CANCEL = "cancel"
    """Somebody on this side wants no migration any more."""
    LOADED = "loaded"
    """Destination: everything has come and is in place."""
    READY = "ready"
    """The destination has said so."""
    GO = "go"
    """The source has said that it never runs the machine again by itself."""
    SHUT = "shut"
    """The destination has said that the machine runs there."""
    REFUSED = "refused"
    """The other side has said that it failed, and does not run the machine."""
    LOST = "lost"
    """The connection broke, fell silent, or something failed here that ended it."""
    GONE = "gone"
    """The other side does not run the machine and never will: its process is known to be dead, or
    an operator vouches for it."""


Table = Mapping[Stage, Mapping[Word, Stage]]

_OFF: Final = (Word.CANCEL, Word.REFUSED, Word.LOST, Word.GONE)
_UNDO: Final = dict.fromkeys(_OFF, Stage.RESUMED)
_DROP: Final = dict.fromkeys(_OFF, Stage.DISCARDED)

SOURCE: Final[Table] = {
    Stage.PRECOPY: {Word.STOP: Stage.STOPPED} | _UNDO,
    Stage.STOPPED: {Word.SENT: Stage.OFFERED} | _UNDO,
    Stage.OFFERED: {Word.READY: Stage.GIVEN} | _UNDO,
    # No row for CANCEL from here on: it comes too late.
    Stage.GIVEN: {
        Word.SHUT: Stage.RELEASED,
        Word.REFUSED: Stage.RESUMED,
        Word.LOST: Stage.UNKNOWN,
        Word.GONE: Stage.RESUMED,
    },
    Stage.UNKNOWN: {Word.SHUT: Stage.RELEASED, Word.GONE: Stage.RESUMED},
    Stage.RELEASED: {},
    Stage.RESUMED: {},
}
"""A source whose destination waits for GO."""

SOURCE_OF_QEMU: Final[Table] = {**SOURCE, Stage.STOPPED: {Word.SENT: Stage.GIVEN} | _UNDO}
"""A source whose destination is a QEMU; SENT is all before the end of the stream."""

DESTINATION: Final[Table] = {
    Stage.LOADING: {Word.LOADED: Stage.READY} | _DROP,
    # Once the source is gone, with or without GO, nobody else has the machine.
    Stage.READY: {
        Word.GO: Stage.TAKEN,
        Word.GONE: Stage.TAKEN,
        Word.LOST: Stage.WAITING,
        Word.CANCEL: Stage.DISCARDED,
        Word.REFUSED: Stage.DISCARDED,
    },
    Stage.WAITING: {Word.GONE: Stage.TAKEN, Word.CANCEL: Stage.DISCARDED},
    Stage.TAKEN: {},
    Stage.DISCARDED: {},
}
"""A destination that waits for GO."""

MAY_RUN: Final = frozenset({Stage.PRECOPY, Stage.RESUMED, Stage.TAKEN})
"""Where the machine may run, or be made to run, on this side."""

IN_DOUBT: Final = frozenset({Stage.UNKNOWN, Stage.WAITING})
"""Where this side cannot know, and a word of somebody else has to decide."""


class Handover:
    """One side of a handover, moved by any thread along *table* from its first row on."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._lock = threading.Lock()
        self._stage = next(iter(table))

    @property
    def stage(self) -> Stage:
        """Where this side is now."""
        return self._stage

    @property
    def may_run(self) -> bool:
        """Whether the machine may run on this side."""
        return self._stage in MAY_RUN

    def hear(self, word: Word) -> Stage | None:
        """Move on by *word*; the stage that was left.

        ``None`` where the word does not count any more, as a cancel behind GO.  Of two words that
        exclude each other, heard by two threads, exactly one counts.
        """
        with self._lock:
            left = self._stage
            to = self._table[left].get(word)
            if to is None:
                return None
            self._stage = to
            return left
