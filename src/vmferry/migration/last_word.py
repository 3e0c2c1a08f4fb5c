"""Who has a machine that has been loaded, where its source, or a record, has the last word.

:mod:`.takeover` has the words, and :mod:`vmferry.ownership` the record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from vmferry.errors import ChannelClosed, PeerError, TransportError, UsageError
from vmferry.faults import reach
from vmferry.ownership.engine import Ownership
from vmferry.ownership.identity import NUMBERS, Identity
from vmferry.transports import Channel
from vmferry.wire.return_path import Pong

from .answers import Answers
from .postcopy.destination import PostcopyDestination
from .progress import Meter
from .takeover import ANNOUNCE, OWNED, READY, TOKEN, Takeover


class LastWord:
    """Hears on which word the machine is this side's, and claims it with *claim* then.

    *ownership* is the record of who owns the machine, if this side heeds one; *let_go* undoes what
    *claim* does.  *idle* is how many seconds the source may be silent before that is a doubt.
    """

    def __init__(
        self,
        answers: Answers,
        ownership: Ownership | None,
        meter: Meter,
        *,
        idle: float | None,
        claim: Callable[[], None],
        let_go: Callable[[], None],
    ) -> None:
        self._answers = answers
        self._ownership = ownership
        self._meter = meter
        self._idle = idle
        self._claim = claim
        self._let_go = let_go
        self._announced: list[int] | None = None
        self._token: list[int] | None = None
        self._takeover: Takeover | None = None
        self._cancelled = False

    def note(self, value: int) -> bool:
        """A ping of the source, which may announce itself; whether it has now said who it is."""
        if self._token is not None and len(self._token) < TOKEN:
            self._token.append(value)
        elif self._announced is not None and len(self._announced) < NUMBERS:
            self._announced.append(value)
            return len(self._announced) == NUMBERS
        elif value == OWNED and self._announced is not None:
            self._token = []
        elif value == ANNOUNCE:
            self._announced = []
        return False

    @property
    def is_announced(self) -> bool:
        """Whether the source is an engine of this kind."""
        return self._announced is not None

    @property
    def source(self) -> Sequence[int]:
        """The pings by which the source has announced itself; none where it has not."""
        return () if self._announced is None else (ANNOUNCE, *self._announced)

    @property
    def is_awaited(self) -> bool:
        """Whether the machine is not this side's as soon as it is loaded."""
        return self.is_announced or self._ownership is not None

    def take(self, main: Channel) -> None:
        """Return when the machine is this side's, and claimed; all of it is loaded."""
        takeover = self._takeover = Takeover(main, self._identity())
        # Either this sees that it was cancelled, or whoever cancels sees the takeover.
        if self._cancelled:
            raise ChannelClosed("the migration was cancelled on this side")
        ownership = self._check_owned()
        self._say_ready()
        if ownership is None:
            takeover.wait(self._idle, self._doubt)
        else:
            takeover.wait_for(ownership.try_take, self._idle, self._doubt)
        self._take(ownership)

    def check(self) -> None:
        """Refuse a source that does not say who it is, or heeds another record, or none."""
        self._identity()
        self._check_owned()

    def take_early(self, postcopy: PostcopyDestination) -> None:
        """As :meth:`take`, of a machine whose memory is still at its source; it was checked."""
        self._say_ready()
        ownership = self._ownership
        is_asked = postcopy.await_go(None if ownership is None else ownership.try_take)
        self._take(ownership)
        if is_asked:  # as long as it was not answered the source can have the machine back
            postcopy.answer_go()

    def decline(self) -> None:
        """The machine is not to be this side's."""
        if self._ownership is not None:
            self._let_go()
            self._ownership.decline()

    def decide(self, *, take: bool) -> None:
        """An operator's word, in doubt."""
        if self._takeover is None:
            raise UsageError("there is no doubt about who has the machine")
        self._takeover.decide(take=take)

    def cancel(self) -> None:
        """Wait for no word any more."""
        self._cancelled = True
        if self._takeover is not None:
            self._takeover.decide(take=False)

    def _identity(self) -> Identity:
        numbers = self._announced or []
        if len(numbers) < NUMBERS:
            raise PeerError("the source announced itself, and did not say who it is")
        return Identity.from_numbers(numbers)

    def _say_ready(self) -> None:
        self._meter.phase("ready")
        with suppress(TransportError):  # it may have arrived nonetheless
            for number in (READY, *Identity.own().numbers()):
                self._answers.say(Pong(number))
        reach("ready-said")

    def _doubt(self) -> None:
        self._meter.phase("in-doubt")

    def _take(self, ownership: Ownership | None) -> None:
        if ownership is None:
            reach("go-heard")
            return self._claim()
        # Between the two: nobody else may have the images now, and it does not run yet.
        ownership.carry_out(self._claim)
        if not ownership.start():
            raise PeerError("the machine is another engine's by now")
        reach("go-heard")
        # Its lease may have lapsed meanwhile, and its images been let go of.
        ownership.carry_out(self._claim)
        return None

    def _check_owned(self) -> Ownership | None:
        """Both sides heed the same record, or none."""
        ownership, token = self._ownership, self._token
        if ownership is None:
            if token is not None:
                raise PeerError(
                    "the source's machine has a record of who owns it, and this side's names none:"
                    " name the same store on both sides"
                )
            return None
        if token is None or len(token) < TOKEN:
            raise PeerError(
                f"the source names no record of who owns its machine, and this side heeds"
                f" {ownership.store.uri}: name the same store on both sides"
            )
        ownership.expect(token[0] << 32 | token[1], self._idle)
        return ownership
