"""One machine's migrations, as a monitor sees them: what QEMU's QMP commands do, as methods.

QEMU 7.2 ``migration/migration.c`` (``qmp_migrate`` and its neighbours).
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import StrEnum
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

from vmferry.errors import ChannelClosed, PeerError, UsageError, VmferryError
from vmferry.images import activate_all, inactivate_all
from vmferry.ownership.engine import Ownership
from vmferry.ownership.store import record_beside
from vmferry.transports import Listener, connect, listen
from vmferry.transports.uri import TcpAddress, UnixAddress, parse

from . import capabilities as caps
from . import parameters as params
from .bitmaps import DirtyBitmaps
from .capabilities import Capability
from .connections import Deadlines
from .destination import Destination
from .events import OPTIONAL, Event, Resumed, Stalled, StatusChanged, Stopped, Warned, to_qmp
from .incoming_disks import IncomingDisks
from .live import LiveSource
from .machine import LiveMachine
from .machine_sink import MachineSink
from .parameters import Parameters
from .postcopy.destination import PostcopyDestination, check_host
from .progress import Meter, Progress
from .source import Connect
from .statistics import Statistics, query_incoming
from .status import DESTINATION, ENDS, POSTCOPY, SOURCE, UNDER_WAY, Status, StatusTrack, Table

Notify: TypeAlias = Callable[[str, dict[str, Any]], None]
"""Told the name and the data of each QMP event, by any thread.  It may call a :class:`Control`, and
has to be quick."""


_PHASES: Final = {str(status): status for status in (Status.ACTIVE, *POSTCOPY)}
"""The phases of a destination that are statuses."""


_STOPS: Final = 0.5
"""Seconds after which a machine is said to wait for memory, when it is to stop."""


class RunState(StrEnum):
    """What the machine does, under the names of QEMU's ``RunState``."""

    RUNNING = "running"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    IO_ERROR = "io-error"
    POSTMIGRATE = "postmigrate"


class Control:
    """Migrates one *machine*, as QEMU's monitor lets you; any thread may call.

    *notify* is told QMP's events: ``STOP``, ``RESUME``, ``VMFERRY_STALLED``, ``VMFERRY_WARNING``,
    and with capability ``events`` ``MIGRATION`` and ``MIGRATION_PASS``; :meth:`watch` gives all
    there is.  A machine
    that is *awaited* has nothing in it that could run before :meth:`incoming` has brought it.  What
    a method raises is a :class:`~vmferry.errors.VmferryError`, and nothing has changed then.  With
    *ownership* the record decides where the machine may run, and no operator's ``cont`` does.
    """

    def __init__(
        self,
        machine: LiveMachine,
        *,
        notify: Notify | None = None,
        awaited: bool = False,
        ownership: Ownership | None = None,
    ) -> None:
        self.machine = machine
        self._ownership = ownership
        self._awaited = awaited
        self._notify = notify or (lambda _name, _data: None)
        self._lock = threading.RLock()
        self.capabilities: frozenset[Capability] = frozenset({Capability.RETURN_PATH})
        self.parameters = Parameters()
        self._track = self._new_track(SOURCE)
        self._source: LiveSource | None = None
        self._destination: Destination | None = None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._progress = Progress("setup")
        self._statistics: Statistics | None = None
        self._given_away = False
        self._io_error = False
        self.bitmaps = DirtyBitmaps(machine.images, self._has_bitmaps_under_way)
        self._watchers: list[SimpleQueue[Event]] = []
        self._error: Exception | None = None
        self._address = ""
        self._stall = ""

    # Settings

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        """``migrate-set-capabilities``."""
        with self._lock:
            if self._track.current in UNDER_WAY:
                raise UsageError("capabilities cannot be changed while a migration is under way")
            wanted = caps.checked(self.capabilities, changes, incoming=self._awaited)
            counts_waits = Capability.POSTCOPY_BLOCKTIME in wanted
            if self._awaited and Capability.POSTCOPY_RAM in wanted:
                check_host(kernel=self._kernel_faults, threads=counts_waits)
            self.capabilities = wanted

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """``migrate-set-parameters``; they count at once, also while a migration is under way."""
        with self._lock:
            self.parameters = params.changed(self.parameters, changes)
            if self._source is not None:
                self._source.parameters_changed()

    # The machine

    @property
    def run_state(self) -> RunState:
        """What the machine does now."""
        source = self._source
        stops = source is not None and source.has_stopped and self._track.current in UNDER_WAY
        if self.machine.running and not stops:
            return RunState.RUNNING
        if self._given_away:
            return RunState.POSTMIGRATE
        if self._awaited:
            return RunState.INMIGRATE
        return RunState.FINISH_MIGRATE if stops else self._stands_as

    @property
    def _stands_as(self) -> RunState:
        """What a machine does that is here and does not run."""
        return RunState.IO_ERROR if self._io_error else RunState.PAUSED

    @property
    def status(self) -> Status:
        """The status of the latest migration."""
        return self._track.current

    @property
    def error(self) -> Exception | None:
        """Why the latest migration failed."""
        return self._error

    @property
    def in_doubt(self) -> bool:
        """Whether it cannot be known which side has the machine, and an operator may decide."""
        if self._destination is not None:
            return self._progress.phase == "in-doubt"
        return self._given_away and self._track.current == Status.FAILED

    def stop(self) -> None:
        """``stop``: let the machine stand still."""
        with self._lock:
            self._refuse_while(RunState.INMIGRATE, RunState.FINISH_MIGRATE)
            was_running = self.machine.running
            self.machine.pause()
            if self._ownership is not None:
                self._ownership.stand_still()
        if was_running:
            self._tell(Stopped())

    def io_error(self, is_so: Callable[[], bool]) -> None:
        """Stop the machine for a disk that failed: ``io-error`` until ``cont``.

        A machine that stands still already is left as it is; so is one where that is no longer so,
        as it was stopped meanwhile and goes on.  Not for the thread of the disk, which has to be
        done with the request when the machine stops.
        """
        with self._lock:
            if self.run_state is not RunState.RUNNING or not is_so():
                return
            self.machine.pause()
            self._io_error = True
        self._tell(Stopped())

    def cont(self) -> None:
        """``cont``: let the machine run.

        Behind a migration, and in doubt about who has the machine, that is the word of an operator
        who knows that it runs nowhere else.
        """
        with self._lock:
            if self._ownership is not None and not self._ownership.may_run:
                raise UsageError(
                    f"the machine may not run here, as {self._ownership.store.uri} says or may say:"
                    f" it is {self._ownership.stage} (vmferry owner show tells whose it is)"
                )
            if self._destination is not None and self.in_doubt:
                return self._destination.decide(take=True)
            self._refuse_while(RunState.INMIGRATE, RunState.FINISH_MIGRATE)
            was_running = self.machine.running
            self._run()
            self._given_away = self._io_error = False
        if not was_running:
            self._tell(Resumed())
        return None

    def _run(self) -> bool:
        """Let the machine run; false where it does so when its lease counts again."""

        def run() -> None:
            activate_all(self.machine.images)
            self.machine.resume()

        if self._ownership is not None:
            return self._ownership.carry_out(run, runs=True)
        run()
        return True

    def _refuse_while(self, *states: RunState) -> None:
        if self.run_state in states:
            raise UsageError(f"the machine is {self.run_state}: its migration decides")

    # Migrations

    def migrate(self, uri: str) -> None:
        """``migrate``: begin to move the machine to *uri*; :meth:`query` tells how it goes."""
        parse(uri)
        with self._lock:
            if self._track.current in UNDER_WAY:
                raise UsageError("a migration is under way already")
            if self._awaited:
                raise UsageError("the machine has not come yet: it is not here to be migrated")
            if self._given_away:
                raise UsageError("the machine was given away: it is not here to be migrated")
            self._check_record()
            track = self._new_track(SOURCE)
            statistics = Statistics(self._note)
            source = LiveSource(
                self.machine,
                self._connect(uri),
                capabilities=self.capabilities,
                parameters=lambda: self.parameters,
                track=track,
                statistics=statistics,
                tell=self._tell,
                lock=self._lock,
                stands_as=lambda: self._stands_as,
                bitmaps=self.bitmaps,
                ownership=self._ownership,
            )
            self._source, self._statistics, self._destination = source, statistics, None
            self._begin(track, lambda: self._run_source(source))

    def _check_record(self) -> None:
        if Capability.BLOCK in self.capabilities:
            self.check_disks_may_move()

    def check_disks_may_move(self) -> None:
        """Refuse to move disks whose sides cannot have the same record; found late otherwise."""
        if self._ownership is None:
            return
        record = self._ownership.store.uri
        if record in {record_beside(image.name) for image in self.machine.images}:
            raise UsageError(
                f"{record}: each side has images of its own, and the record of who owns the machine"
                " cannot be beside one: let [ownership] name a place that both sides reach, or"
                ' store = "none"'
            )

    def _has_bitmaps_under_way(self) -> bool:
        """Whether a migration counts on the dirty bitmaps that there are."""
        under_way = self._track.current in UNDER_WAY and self._source is not None
        return under_way and Capability.DIRTY_BITMAPS in self.capabilities

    def _connect(self, uri: str) -> Connect:
        return lambda given_up: connect(
            uri, timeout=self.parameters.connect_deadline or None, given_up=given_up
        )

    def start_postcopy(self) -> None:
        """``migrate-start-postcopy``: let the machine go before its memory, as soon as may be."""
        with self._lock:
            if self._source is None or self._track.current not in UNDER_WAY:
                raise UsageError("postcopy is started after a migration has begun")
            self._source.start_postcopy()

    def resume(self, uri: str) -> None:
        """``migrate`` with ``resume``: go on with a migration that is paused, at *uri*."""
        parse(uri)
        with self._lock:
            if self._source is None or self._track.current != Status.POSTCOPY_PAUSED:
                raise UsageError(f"the migration is {self._track.current}, not postcopy-paused")
            self._source.resume(self._connect(uri))

    def incoming(self, uri: str) -> str:
        """``migrate-incoming``: wait at *uri* for a machine; the address for its source."""
        with self._lock:
            if self.machine.running or self._track.current != Status.NONE:
                raise UsageError("only a machine that has not run yet can be loaded")
            self._check_record()
            now = self.parameters
            listener = listen(uri)
            with_disks = Capability.BLOCK in self.capabilities
            incremental = now.block_incremental
            disks = (
                IncomingDisks(self.machine.images, incremental=incremental) if with_disks else None
            )
            sink = MachineSink(self.machine, disks, self.bitmaps)
            meter = Meter(self._note)
            destination = Destination(
                listener,
                sink,
                meter=meter,
                deadlines=Deadlines(
                    now.listen_deadline or None,
                    now.hello_deadline or None,
                    now.idle_deadline or None,
                ),
                max_ram=sys.maxsize,  # the sink takes what the machine has, and nothing else
                claim=lambda: self._claim(sink),
                let_go=lambda: inactivate_all(self.machine.images),
                taken=lambda: self._taken(sink),
                dropped=self._dropped,
                loader=sink,
                ownership=self._ownership,
                postcopy=self._postcopy(sink, meter),
            )
            track = self._new_track(DESTINATION)
            self._destination, self._awaited = destination, True
            self._address = listener.address
            self._begin(track, lambda: self._run_destination(listener, destination, disks))
            return listener.address

    def _postcopy(self, sink: MachineSink, meter: Meter) -> PostcopyDestination | None:
        if Capability.POSTCOPY_RAM not in self.capabilities:
            return None
        now = self.parameters
        counts_waits = Capability.POSTCOPY_BLOCKTIME in self.capabilities
        return PostcopyDestination(
            self.machine.memory,
            kernel=self._kernel_faults,
            preempt=Capability.POSTCOPY_PREEMPT in self.capabilities,
            idle=now.idle_deadline or None,
            first=now.hello_deadline or None,
            mark=sink.mark,
            phase=meter.phase,
            lost=self._lost,
            threads=self.machine.vcpu_threads if counts_waits else None,
        )

    @property
    def _kernel_faults(self) -> bool:
        """Whether the kernel touches guest memory: for virtual CPUs of KVM, and for disks."""
        vcpus = any(len(block.addresses) > 1 for block in self.machine.memory.blocks)
        return vcpus or bool(self.machine.images)

    def recover(self, uri: str) -> str:
        """``migrate-recover``: wait at *uri* for the source of memory that is still missing.

        Where all has come, for a source that did not hear so.  The address for it.  Without the
        lock: whoever has that may wait for such memory.
        """
        destination, status = self._destination, self._track.current
        can_be = destination is not None and (
            status is Status.POSTCOPY_PAUSED
            or (status is Status.COMPLETED and destination.has_followed)
        )
        if destination is None or not can_be:
            raise UsageError(f"the migration is {status}, not postcopy-paused")
        listener = listen(uri)
        self._address = listener.address
        destination.recover(listener)
        return listener.address

    def cancel(self) -> None:
        """``migrate_cancel``: give up an outgoing migration, unless it is too late."""
        with self._lock:
            source = self._source
            if source is not None and self._track.current in UNDER_WAY and source.cancel():
                self._track.move(Status.CANCELLING)

    def cancel_incoming(self) -> None:
        """Wait for no machine any more, or drop the one that is in doubt."""
        if self._destination is not None:
            self._destination.cancel()

    def proceed(self, state: str) -> None:
        """``migrate-continue``: go on from *state*, which is ``pre-switchover``."""
        with self._lock:
            current = self._track.current
            if self._source is None or state != current or current != Status.PRE_SWITCHOVER:
                raise UsageError(f"the migration is {current}, not {state}")
            self._source.proceed()

    def watch(self) -> Iterator[Event]:
        """What happens to the migration from now on, up to and with the status that ends it."""
        events: SimpleQueue[Event] = SimpleQueue()
        self._watchers.append(events)
        try:
            if self._track.current in UNDER_WAY:
                while True:
                    yield (event := events.get())
                    if isinstance(event, StatusChanged) and event.status in ENDS:
                        return
        finally:
            self._watchers.remove(events)

    def wait(self, timeout: float | None = None) -> Status:
        """Wait for the end of the migration, *timeout* seconds at most; its status."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._track.current

    def close(self) -> None:
        """Give up what is under way, and wait for its end.

        Also where the machine runs elsewhere already and needs memory that is only here.
        """
        self.cancel()
        self.cancel_incoming()
        while self._thread is not None and self._thread.is_alive():
            source = self._source
            if source is not None and self._track.current in POSTCOPY:
                source.abandon()
            self.wait(_STOPS)

    def query(self) -> dict[str, Any]:
        """``query-migrate``; ``x-vmferry-stall`` tells of a migration that made no progress.

        Of a machine with a record of who owns it ``x-vmferry-ownership`` says what this side may
        do with it, and ``x-vmferry-doubt`` why it cannot know.
        """
        return self._query() | self._owned()

    def doubted(self, why: str) -> None:
        """Tell that it cannot be known who has the machine, and *why*; nothing: it is known."""
        self._tell(Warned(f"in doubt: {why}" if why else "no longer in doubt"))

    def _owned(self) -> dict[str, Any]:
        if self._ownership is None:
            return {}
        doubt = self._ownership.doubt
        return {"x-vmferry-ownership": str(self._ownership.stage)} | (
            {"x-vmferry-doubt": doubt} if doubt else {}
        )

    def _query(self) -> dict[str, Any]:
        with self._lock:
            status, statistics = self._track.current, self._statistics
            if self._destination is not None:
                listening = status in UNDER_WAY and bool(self._address)
                info = query_incoming(
                    status,
                    _socket_addresses(self._address) if listening else (),
                    waits=self._destination.waits,
                )
                paused = status is Status.POSTCOPY_PAUSED
                return info | ({"error-desc": str(self._error)} if paused else {})
            if statistics is None:
                return {}
            info = statistics.query(
                status,
                capabilities=self.capabilities,
                parameters=self.parameters,
                error=None if self._error is None else str(self._error),
            )
            if status is Status.POSTCOPY_PAUSED and self._source is not None:
                info["error-desc"] = self._source.paused_for
            stalled = self._stall and status in UNDER_WAY
            return info | ({"x-vmferry-stall": self._stall} if stalled else {})

    # In the thread of a migration

    def _new_track(self, table: Table) -> StatusTrack:
        return StatusTrack(table, self._status_changed, lock=self._lock)

    def _begin(self, track: StatusTrack, run: Callable[[], None]) -> None:
        self._track, self._error, self._stall = track, None, ""
        self._progress = Progress("setup")
        track.move(Status.SETUP)
        previous = self._thread

        def run_next() -> None:
            if previous is not None:
                previous.join()  # it has told of its end, and may still have its log
            run()

        self._thread = threading.Thread(target=run_next, name="migration", daemon=True)
        self._thread.start()

    def _run_source(self, source: LiveSource) -> None:
        try:
            end, error = source.run(), None
        except Exception as failure:  # noqa: BLE001 - told by whoever asks
            end, error = Status.FAILED, failure
            _clear_frames(failure)
        try:
            with self._lock:
                self._given_away = source.is_given_away
                self._source = None
                self._end(end, error)
        finally:
            # A log that cannot be stopped is noticed by the next migration.
            with suppress(VmferryError, OSError):
                source.close()

    def _run_destination(
        self, listener: Listener, destination: Destination, disks: IncomingDisks | None
    ) -> None:
        error = None
        try:
            with listener:
                destination.run()
        except Exception as failure:  # noqa: BLE001 - told by whoever asks
            if destination.is_over:
                self._tell(Warned(f"the machine is here, and behind that failed: {failure}"))
            else:
                error = failure
        if isinstance(error, ChannelClosed) and destination.runs_early:
            self._abandon(destination)
        if error is not None and disks is not None and self._awaited:
            disks.let_go()
        with self._lock:
            self._end(Status.COMPLETED if error is None else Status.FAILED, error)

    def _abandon(self, destination: Destination) -> None:
        """End a machine that lacks memory: it must not act on zeros that come in its place."""
        pausing = threading.Thread(target=self.machine.pause, name="pause", daemon=True)
        pausing.start()
        pausing.join(_STOPS)
        # What waits for memory does not stop before it has some; then it finds no disk.
        with suppress(VmferryError):
            inactivate_all(self.machine.images)
        destination.abandon()
        pausing.join()

    def _dropped(self, error: Exception) -> None:
        self._tell(Warned(f"a connection over which no machine came was dropped: {error}"))

    def _lost(self, reason: str) -> None:
        self._error = PeerError(reason)
        self._tell(
            Warned(
                f"the source is lost: {reason}; whoever needs memory that has not come waits for"
                " it: have this side listen (migrate-recover) and the source resume"
            )
        )

    def _claim(self, sink: MachineSink) -> None:
        """Take the disks, unless the machine is to stand still and that is to wait as well."""
        if (
            sink.run_state == RunState.RUNNING
            or Capability.LATE_BLOCK_ACTIVATE not in self.capabilities
        ):
            activate_all(self.machine.images)
        else:
            inactivate_all(self.machine.images)  # those that came with it are active

    def _taken(self, sink: MachineSink) -> None:
        """The machine is this side's."""
        with self._lock:
            self._awaited = False
            self._io_error = sink.run_state == RunState.IO_ERROR
            if sink.run_state == RunState.RUNNING:
                try:
                    runs = self._run()
                except Exception as error:  # noqa: BLE001 - nobody else has the machine
                    self._tell(Warned(f"the machine stays stopped until cont: {error}"))
                    return
                if not runs:
                    return
                self._tell(Resumed())

    def _end(self, status: Status, error: Exception | None = None) -> None:
        if self._track.current == Status.CANCELLING:
            self._track.move(Status.CANCELLED)
        else:
            self._error = error
            self._track.move(status)

    def _note(self, progress: Progress) -> None:
        """Take note of how far it is; guest memory makes a destination active."""
        self._progress = progress
        if self._destination is not None:
            now = self._track.current
            following = _PHASES.get(progress.phase, now)
            if following is not now and following in DESTINATION[now]:
                self._track.move_if(now, following)
                if following is Status.POSTCOPY_ACTIVE:
                    self._address = ""  # it listens no more, until it has to anew
        self._tell(progress)

    def _status_changed(self, status: Status) -> None:
        self._tell(StatusChanged(status))

    def _tell(self, event: Event) -> None:
        if isinstance(event, Stalled):
            self._stall = str(event.report)
        for watcher in list(self._watchers):
            watcher.put(event)
        told = to_qmp(event)
        if told and (told[0] not in OPTIONAL or Capability.EVENTS in self.capabilities):
            self._notify(*told)


def _clear_frames(error: BaseException) -> None:
    """Let go of what was at work when *error* came up: copies of guest memory, perhaps."""
    traceback.clear_frames(error.__traceback__)
    if (cause := error.__cause__ or error.__context__) is not None:
        _clear_frames(cause)


def _socket_addresses(uri: str) -> list[dict[str, str]]:
    """What QEMU calls a ``SocketAddress``, for a URI that is one."""
    match parse(uri):
        case UnixAddress(path):
            return [{"type": "unix", "path": path}]
        case TcpAddress(host, port):
            return [{"type": "inet", "host": host, "port": str(port)}]
        case _:
            return []
