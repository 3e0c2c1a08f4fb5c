"""Moving a machine that runs, from the side where it runs.

QEMU 7.2 ``migration/migration.c`` (``migration_thread``).  The promise: when :meth:`LiveSource.run`
returns, the machine is the destination's; when it raises, the machine runs here as before, except
where :class:`~vmferry.errors.InDoubt` says that this cannot be known.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    PeerSilent,
    StorageError,
    UsageError,
    VmferryError,
)
from vmferry.faults import reach
from vmferry.images import activate_all, inactivate_all
from vmferry.memory import PAGE_SIZE, DirtyLog
from vmferry.ownership.engine import Ownership
from vmferry.ownership.protocol import Stage as Owner
from vmferry.pages import XbzrleCache
from vmferry.transports import Channel, RateLimit
from vmferry.wire.commands import RamDiscard
from vmferry.wire.multifd import Method

from .bitmaps import DirtyBitmap
from .capabilities import Capability
from .convergence import Convergence, Decision, Round
from .disks import LiveDisks
from .draining import flush_all, late
from .events import DowntimeRaised, Event, Pass, Resumed, Stalled, Stopped, Throttled, Warned
from .handover import Stage, Word
from .machine import LiveMachine
from .machine_source import MachineSource
from .parameters import Parameters
from .postcopy.left import Block
from .postcopy.live import Follow, discards, left_of
from .postcopy.server import RamFormat, Service
from .postcopy.way import Way
from .precopy import DirtyBlock, Precopy
from .source import Connect, SendOptions, Source
from .statistics import Statistics
from .status import Status, StatusTrack

_CANCELLED: Final = "the migration was cancelled on this side"

_DEVICE_BYTES: Final = 1 << 16
"""Bytes of a switchover that are not memory, more or less."""

_LINGER: Final = 0.5
"""Seconds between two looks at whether the destination still waits at ``pre-switchover``."""

_OVERHEAD: Final = 0.005
"""Seconds of a switchover that do not depend on the bandwidth, more or less."""


class LiveSource:
    """Moves *machine* over channels that *connect* opens, one migration.

    *parameters* is asked whenever one counts, so they may change meanwhile.  *track* is moved from
    ``setup`` to where the machine can be given away; its end is the caller's to say.  *tell* is
    told what happens besides.  *lock*, a reentrant one, is held by whoever stops the machine or
    lets it run.  *stands_as* is the run state of the machine where it does not run.
    """

    def __init__(
        self,
        machine: LiveMachine,
        connect: Connect,
        *,
        capabilities: frozenset[Capability],
        parameters: Callable[[], Parameters],
        track: StatusTrack,
        statistics: Statistics,
        tell: Callable[[Event], None],
        lock: AbstractContextManager[object],
        stands_as: Callable[[], str],
        bitmaps: Iterable[DirtyBitmap] = (),
        ownership: Ownership | None = None,
    ) -> None:
        machine.registry.check_migratable()
        self._machine = machine
        self._ownership = ownership
        self._parameters = parameters
        self._tell = tell
        self._lock = lock
        self._stands_as = stands_as
        self._capabilities = capabilities
        self._pauses = Capability.PAUSE_BEFORE_SWITCHOVER in capabilities
        self._ignores_shared = Capability.IGNORE_SHARED in capabilities
        self._track = track
        self._statistics = statistics
        self._outgoing = MachineSource(machine, capabilities, bitmaps)
        self._cleanup = ExitStack()
        self._log: DirtyLog | None = None
        self._convergence = Convergence(device_bytes=_DEVICE_BYTES, overhead=_OVERHEAD)
        self._cache: XbzrleCache | None = None
        self._synced = (0.0, 0)
        passes = self._passes = Precopy(self, machine.registry.handlers, statistics, self._cleanup)
        self._source = Source(
            self._outgoing,
            connect,
            options=self._options(capabilities),
            meter=statistics,
            passes=passes,
            follower=self,
            ownership=ownership,
        )
        self._proceed = threading.Event()
        self._wants_postcopy = threading.Event()
        self._ahead: list[Block] = []
        self.background = RateLimit(self._parameters().max_postcopy_bandwidth or None)
        """The limit of memory that nobody has asked for, in postcopy."""
        self._connects: SimpleQueue[Connect | None] = SimpleQueue()
        self.paused_for = ""
        """Why a postcopy was paused the last time."""
        self.has_stopped = False
        """Whether the migration keeps the machine from running."""
        self._is_stopping = False
        self._not_stopped: VmferryError | None = None

    def run(self) -> Status:
        """Move the machine, or raise with the machine running as before.

        Returns ``sent`` where there is nobody to say that it was loaded, else ``completed``.
        :meth:`close` comes afterwards in any case.
        """
        try:
            self._source.run()
        except BaseException as error:
            if self._source.is_over:  # whatever fails now, the machine has gone
                self._tell(Warned(f"all was sent, and behind that something failed: {error}"))
            elif self._is_back():
                self._take_back()
                raise
            elif self._source.handover.hear(Word.SHUT) is None:
                raise
        finally:
            self._clean_up()
        if self._source.handover.stage == Stage.RELEASED:
            return Status.COMPLETED
        self._statistics.finished()
        return Status.SENT

    def _clean_up(self) -> None:
        """Undo what was set up; what fails there changes nothing about whose the machine is."""
        try:
            self._cleanup.close()
        except Exception as error:  # noqa: BLE001 - a machine's own handlers, and its throttle
            self._tell(Warned(f"cleaning up behind the migration failed: {error}"))

    def close(self) -> None:
        """Stop the log, which takes the kernel a while; the machine may run meanwhile."""
        self._cache = None
        if self._log is not None:
            self._log.stop()

    def cancel(self) -> bool:
        """Give up, from any thread; the machine runs when this returns, unless it is too late."""
        if not self._source.cancel():
            return False
        with self._lock:
            if self._is_stopping:
                self._end_wait(ChannelClosed(_CANCELLED))
            elif self._ownership is None:
                self._take_back()  # else the record has to say so first, to whoever runs this
        self._proceed.set()
        return True

    @property
    def is_given_away(self) -> bool:
        """Whether the machine may run, or have run, at the destination."""
        if self._ownership is not None and self._ownership.stage is Owner.GONE:
            return True
        return not self._source.handover.may_run

    def proceed(self) -> None:
        """Go on from ``pre-switchover``."""
        self._proceed.set()

    def parameters_changed(self) -> None:
        """Heed parameters that were changed."""
        with self._lock:
            if not self.has_stopped:
                self._source.limit.rate = self._parameters().max_bandwidth or None
        self.background.rate = self._parameters().max_postcopy_bandwidth or None

    def _options(self, capabilities: frozenset[Capability]) -> SendOptions:
        now = self._parameters()
        multifd = Capability.MULTIFD in capabilities
        postcopy = Capability.POSTCOPY_RAM in capabilities
        if multifd and postcopy:
            # QEMU 7.2 takes it, later ones refuse it too.
            raise UsageError("postcopy-ram cannot be on with multifd: turn one of them off")
        if postcopy and Capability.BLOCK in capabilities:
            # QEMU takes it, and sends all of the disks before the machine goes.
            raise UsageError("postcopy-ram cannot be on with block: turn one of them off")
        if postcopy and Capability.DIRTY_BITMAPS in capabilities:
            # QEMU takes it, and sends them behind the machine.
            raise UsageError("postcopy-ram cannot be on with dirty-bitmaps: turn one of them off")
        method = now.multifd_compression.method if multifd else Method.NONE
        levels = {Method.ZLIB: now.multifd_zlib_level, Method.ZSTD: now.multifd_zstd_level}
        return SendOptions(
            multifd=now.multifd_channels if multifd else 0,
            return_path=postcopy or Capability.RETURN_PATH in capabilities,
            method=method,
            level=levels.get(method, 0),
            bandwidth=now.max_bandwidth or None,
            postcopy=postcopy,
            preempt=Capability.POSTCOPY_PREEMPT in capabilities,
            idle=now.idle_deadline or None,
            answer=now.answer_deadline or None,
        )

    def _is_back(self) -> bool:
        """Whether the machine may be this side's again: the record says so, where there is one.

        That may take as long as its store is silent, and the machine stands still meanwhile.
        """
        if self._ownership is None:
            return True
        if not self._ownership.undo():
            return False
        reach("back")
        self._source.handover.hear(Word.GONE)
        return True

    def _take_back(self) -> None:
        """Let the machine run again where the migration has stopped it; only once."""
        with self._lock:
            if not self.has_stopped or not self._source.handover.may_run:
                return
            self.has_stopped = False
            runs = self._outgoing.was_running
            try:
                if self._ownership is None:
                    self._run_again()
                elif not self._ownership.carry_out(self._run_again, runs=runs):
                    return  # its lease has lapsed, and it runs when that counts again
            except StorageError as error:
                self._tell(Warned(f"the machine stays stopped until cont: {error}"))
                return
            if runs:
                self._tell(Resumed())

    def _run_again(self) -> None:
        activate_all(self._machine.images)
        if self._outgoing.was_running:
            self._machine.resume()

    # Postcopy

    def start_postcopy(self) -> None:
        """Let the machine go before its memory, as soon as may be."""
        if Capability.POSTCOPY_RAM not in self._capabilities:
            raise UsageError("turn on the capability postcopy-ram before the migration begins")
        self._wants_postcopy.set()

    def resume(self, connect: Connect) -> None:
        """Go on with a migration that is paused, over channels that *connect* opens.

        Raises :class:`UsageError` where it is not, or somebody was quicker.
        """
        self._track.move(Status.POSTCOPY_RECOVER)
        self._connects.put(connect)

    def abandon(self) -> None:
        """Break off though the machine may need memory that is only here."""
        self._connects.put(None)
        self._source.abandon()

    def wants_postcopy(self) -> bool:
        """See :class:`~.precopy.Lead`."""
        return self._wants_postcopy.is_set()

    def discards_ahead(self) -> list[RamDiscard]:
        """See :class:`~.postcopy.way.Follower`."""
        blocks = left_of(self._passes.look(), self._ahead)
        commands = list(discards(blocks, self._ahead))
        self._ahead = blocks
        return commands

    def follow(self, way: Way, ram: RamFormat) -> None:
        """See :class:`~.postcopy.way.Follower`."""
        blocks = left_of(self._passes.switch(), self._ahead)
        self._passes.end()
        self._statistics.switched()
        Follow(
            self._outgoing,
            blocks,
            list(discards(blocks, self._ahead)),
            ram,
            way,
            lead=self,
            handover=self._source.handover,
            ownership=self._ownership,
            meter=self._statistics,
            is_off=self._source.is_off,
        ).run()
        self._passes.done()

    @property
    def service(self) -> Service:
        """See :class:`~.postcopy.live.Lead`."""
        return self._statistics.service

    def gone(self) -> None:
        """See :class:`~.postcopy.live.Lead`."""
        self._statistics.runs_there()
        self._track.move(Status.POSTCOPY_ACTIVE)

    def remains(self, size: int) -> None:
        """See :class:`~.postcopy.live.Lead`."""
        self._statistics.remains(size)

    def paused(self, error: VmferryError) -> None:
        """See :class:`~.postcopy.live.Lead`."""
        self.paused_for = str(error)
        self._track.move(Status.POSTCOPY_PAUSED)
        self._tell(
            Warned(
                f"the destination is lost: {error}; the machine waits there for memory that is only"
                " here: have it listen again (migrate-recover), and resume"
            )
        )

    def await_resume(self) -> Callable[[], tuple[Channel, Channel | None]]:
        """See :class:`~.postcopy.live.Lead`."""
        connect = self._connects.get()
        if connect is None:
            raise ChannelClosed("the migration was broken off on this side")
        return partial(self._source.reconnect, connect)

    def resumed(self) -> None:
        """See :class:`~.postcopy.live.Lead`."""
        self._track.move(Status.POSTCOPY_ACTIVE)

    # What the passes ask for

    def begin(self) -> LiveDisks | None:
        """See :class:`~.precopy.Lead`."""
        self._blocks = self._machine.memory.blocks
        self._track.move(Status.ACTIVE)
        if Capability.BLOCK not in self._capabilities:
            return None
        disks = LiveDisks(
            self._machine.images,
            self._cleanup,
            zeroes=Capability.ZERO_BLOCKS in self._capabilities,
            incremental=self._parameters().block_incremental,
        )
        self._statistics.disks = disks
        return disks

    def start(self) -> list[DirtyBlock]:
        """See :class:`~.precopy.Lead`."""
        log = self._log = self._machine.dirty_log()
        log.start()
        self._synced = time.monotonic(), self._statistics.counters().transferred
        self._check_memory()
        return [
            DirtyBlock(block, log)
            for block in self._blocks
            if not (block.shared and self._ignores_shared)
        ]

    def delta(self) -> XbzrleCache | None:
        """See :class:`~.precopy.Lead`."""
        if Capability.XBZRLE not in self._capabilities:
            return None
        size = self._parameters().xbzrle_cache_size
        if self._cache is None:
            self._cache = XbzrleCache(size, PAGE_SIZE)
        elif self._cache.size != size:
            self._cache.resize(size)
        return self._cache

    def moved(self) -> None:
        """See :class:`~.precopy.Lead`."""
        if (sample := self._statistics.sample()) is not None:
            self._convergence.sample(sample.sent, sample.seconds)

    def another(self, remaining: int) -> bool:
        """See :class:`~.precopy.Lead`."""
        parameters = self._parameters()
        decision = self._convergence.round_ended(
            self._round(remaining), parameters, self._capabilities
        )
        self._heed(decision)
        self._statistics.expect(
            dirty_rate=self._convergence.dirty_rate,
            downtime=self._convergence.expected_downtime(remaining, parameters),
            throttle=self._convergence.throttle,
        )
        return not decision.switch_over

    def synced(self, remaining: int) -> None:
        """See :class:`~.precopy.Lead`."""
        self._statistics.synced(remaining)
        self._tell(Pass(self._statistics.round, remaining))

    def stop(self) -> None:
        """See :class:`~.precopy.Lead`."""
        patience = self._parameters().drain_deadline or None
        alarm = threading.Timer(patience or 0, self._is_late, (patience,))
        alarm.daemon = True
        if patience is not None:
            alarm.start()  # before the machine stands still, which has not to wait for a thread
        try:
            self._stop()
        finally:
            alarm.cancel()
        flush_all(self._machine.images, patience, self._source.is_off)
        with self._lock:
            # Where its lease lapsed and came back meanwhile, it was let run again.
            ownership = self._ownership
            if ownership is not None and (not ownership.stop() or self._machine.running):
                raise StorageError("the lease of this side's ownership of the machine has lapsed")
        reach("stopped")
        if self._pauses:
            self._track.move(Status.PRE_SWITCHOVER)
            self._await_proceed()
            self._track.move(Status.DEVICE)

    def _stop(self) -> None:
        """Have the machine stand still, unless it is not wanted any more or takes too long.

        That is waited for without the lock, so that somebody can say so.
        """
        with self._lock:
            if self._source.handover.hear(Word.STOP) is None:
                raise ChannelClosed(_CANCELLED)
            # Somebody may have paused it meanwhile.
            self._outgoing.was_running = self._machine.running
            self._outgoing.stood_as = self._stands_as()
            self.has_stopped = self._is_stopping = True
            # The limit is for the time when the machine runs.
            self._source.limit.rate = None
            self._statistics.stopped()
        error = None
        try:
            self._machine.pause()
        except Exception as failure:  # noqa: BLE001 - raised below, unless the wait was ended
            error = failure
        with self._lock:
            self._is_stopping = False
            if self._not_stopped is None:
                if error is not None:
                    raise error
                if self._outgoing.was_running:
                    self._tell(Stopped())
                return
            self.has_stopped = False
            self._run_on()
            raise self._not_stopped

    def _is_late(self, patience: float) -> None:
        with self._lock:
            if self._is_stopping:
                self._end_wait(late(self._machine.images, patience))

    def _end_wait(self, why: VmferryError) -> None:
        """The machine is not to stand still after all; whoever waits for that sees to the rest."""
        self._not_stopped = self._not_stopped or why
        self._run_on()

    def _run_on(self) -> None:
        """Let the machine run as before, or when its lease counts again."""
        if not self._outgoing.was_running:
            return
        if self._ownership is None:
            self._machine.resume()
        else:
            self._ownership.carry_out(self._machine.resume, runs=True)

    def let_go(self) -> None:
        """See :class:`~.precopy.Lead`."""
        with self._lock:
            if not self.has_stopped:
                raise ChannelClosed(_CANCELLED)  # and the machine runs already
            inactivate_all(self._machine.images)
        reach("images-inactive")
        self._check_memory()

    def _check_memory(self) -> None:
        if self._machine.memory.blocks != self._blocks:
            raise UsageError("memory was added to the machine while it was being moved: try again")

    def _round(self, remaining: int) -> Round:
        """What the round that ends now was like."""
        since, before = self._synced
        at, sent = self._synced = time.monotonic(), self._statistics.counters().transferred
        return Round(sent - before, at - since, remaining, remaining)

    def _heed(self, decision: Decision) -> None:
        if decision.stall is not None:
            self._tell(Stalled(decision.stall))
        if decision.postcopy:
            self._wants_postcopy.set()
        if decision.give_up:
            raise VmferryError(f"the migration was given up: {decision.stall}")
        if decision.downtime_limit is not None:
            self._tell(DowntimeRaised(decision.downtime_limit))
        if decision.throttle is not None:
            self._cleanup.callback(self._machine.throttle, 0)
            self._machine.throttle(decision.throttle)
            self._tell(Throttled(decision.throttle))

    def _await_proceed(self) -> None:
        patience = self._parameters().continue_deadline
        deadline = time.monotonic() + (patience or math.inf)
        while not self._proceed.wait(_LINGER):
            if time.monotonic() > deadline:
                raise PeerSilent(f"nobody said within {patience:g} s to go on from pre-switchover")
            # The machine stands still here: it must not wait for a destination that has gone.
            self._source.linger()
        if self._source.handover.may_run:
            raise ChannelClosed(_CANCELLED)
