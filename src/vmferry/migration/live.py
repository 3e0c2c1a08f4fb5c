"""Moving a machine that runs, from the side where it runs.

QEMU 7.2 ``migration/migration.c`` (``migration_thread``).  The promise: when :meth:`LiveSource.run`
returns, the machine is the destination's; when it raises, the machine runs here as before, except
where :class:`~vmferry.errors.InDoubt` says that this cannot be known.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack

from vmferry.errors import ChannelClosed, PeerSilent, UsageError
from vmferry.faults import reach
from vmferry.transports import Channel
from vmferry.wire.multifd import Method

from .capabilities import Capability
from .handover import Stage, Word
from .machine import LiveMachine
from .machine_source import MachineSource
from .parameters import Parameters
from .precopy import DirtyBlock, Precopy
from .source import SendOptions, Source
from .statistics import Statistics
from .status import Status, StatusTrack


class LiveSource:
    """Moves *machine* over channels that *connect* opens, one migration.

    *parameters* is asked whenever one counts, so they may change meanwhile.  *track* is moved from
    ``setup`` to where the machine can be given away; its end is the caller's to say.
    """

    def __init__(
        self,
        machine: LiveMachine,
        connect: Callable[[], Channel],
        *,
        capabilities: frozenset[Capability],
        parameters: Callable[[], Parameters],
        track: StatusTrack,
        statistics: Statistics,
    ) -> None:
        machine.registry.check_migratable()
        self._machine = machine
        self._parameters = parameters
        self._pauses = Capability.PAUSE_BEFORE_SWITCHOVER in capabilities
        self._ignores_shared = Capability.IGNORE_SHARED in capabilities
        self._track = track
        self._statistics = statistics
        self._outgoing = MachineSource(machine, capabilities)
        self._cleanup = ExitStack()
        self._precopy = Precopy(
            machine.registry.handlers,
            self._start,
            self._another,
            self._stop,
            statistics,
            self._cleanup,
        )
        self._source = Source(
            self._outgoing,
            connect,
            options=self._options(capabilities),
            meter=statistics,
            passes=self._precopy,
        )
        self._proceed = threading.Event()
        self.has_stopped = False

    def run(self) -> Status:
        """Move the machine, or raise with the machine running as before.

        Returns ``sent`` where there is nobody to say that it was loaded, else ``completed``.
        """
        with self._cleanup:
            try:
                self._source.run()
            except BaseException:
                self._take_back()
                raise
        if self._source.handover.stage == Stage.RELEASED:
            return Status.COMPLETED
        self._statistics.finished()
        return Status.SENT

    def cancel(self) -> bool:
        """Give up, from any thread; the machine runs when this returns, unless it is too late."""
        if not self._source.cancel():
            return False
        self._take_back()
        self._proceed.set()
        return True

    @property
    def is_given_away(self) -> bool:
        """Whether the machine may run, or have run, at the destination."""
        return not self._source.handover.may_run

    def proceed(self) -> None:
        """Go on from ``pre-switchover``."""
        self._proceed.set()

    def parameters_changed(self) -> None:
        """Heed parameters that were changed."""
        if not self.has_stopped:
            self._source.limit.rate = self._parameters().max_bandwidth or None

    def _options(self, capabilities: frozenset[Capability]) -> SendOptions:
        now = self._parameters()
        multifd = Capability.MULTIFD in capabilities
        return SendOptions(
            multifd=now.multifd_channels if multifd else 0,
            return_path=Capability.RETURN_PATH in capabilities,
            method=now.multifd_compression.method if multifd else Method.NONE,
            bandwidth=now.max_bandwidth or None,
            idle=now.idle_deadline or None,
            answer=now.answer_deadline or None,
        )

    def _take_back(self) -> None:
        if self._source.handover.may_run and self._outgoing.was_running:
            self._machine.resume()

    # What the memory passes ask for

    def _start(self) -> list[DirtyBlock]:
        log = self._machine.dirty_log()
        self._cleanup.callback(log.stop)
        log.start()
        self._track.move(Status.ACTIVE)
        blocks = self._blocks = self._machine.memory.blocks
        return [
            DirtyBlock(block, log)
            for block in blocks
            if not (block.shared and self._ignores_shared)
        ]

    def _another(self, remaining: int) -> bool:
        return remaining > 1 << 20

    def _stop(self) -> None:
        self.has_stopped = True
        self._statistics.stopped()
        self._machine.pause()
        reach("stopped")
        if self._machine.memory.blocks != self._blocks:
            raise UsageError("memory was added to the machine while it was being moved: try again")
        if self._source.handover.hear(Word.STOP) is None:
            raise ChannelClosed("the migration was cancelled on this side")
        # The limit is for the time when the machine runs.
        self._source.limit.rate = None
        if self._pauses:
            self._track.move(Status.PRE_SWITCHOVER)
            self._await_proceed()
            self._track.move(Status.DEVICE)

    def _await_proceed(self) -> None:
        deadline = self._parameters().continue_deadline
        if not self._proceed.wait(deadline or None):
            raise PeerSilent(f"nobody said within {deadline:g} s to go on from pre-switchover")
        if self._source.handover.may_run:
            raise ChannelClosed("the migration was cancelled on this side")
