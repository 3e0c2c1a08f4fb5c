"""A machine that this process hosts, from its start until it is over, with a monitor if wanted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

from vmferry.errors import MachineError, StorageError, UsageError
from vmferry.images import activate_all, inactivate_all
from vmferry.machines import HostedMachine, IoError, MachineConfig, create
from vmferry.machines.guest.console import Console
from vmferry.machines.observer import check
from vmferry.migration.control import Control, RunState
from vmferry.migration.events import WARNING
from vmferry.migration.status import Status
from vmferry.ownership.engine import Ownership
from vmferry.ownership.store import open_store
from vmferry.qemu.block import block_io_error, query_block
from vmferry.qemu.block_jobs import BlockJobs
from vmferry.qemu.commands import Command
from vmferry.qemu.exports import Exports, Served
from vmferry.qemu.messages import Object
from vmferry.qemu.monitor import GREETING, machine_commands
from vmferry.qemu.server import QmpServer

DEFER: Final = "defer"
"""What to wait for a machine at where ``migrate-incoming`` will say it."""

QUIT: Final = "host-qmp-quit"
SIGNAL: Final = "host-signal"
GUEST: Final = "guest-shutdown"
ERROR: Final = "host-error"
"""Why a machine is over, in QEMU's words (``ShutdownCause`` in ``qapi/run-state.json``)."""

IN_DOUBT: Final = "in-doubt"

CHECK: Final = "x-vmferry-check"
"""The command of the monitor that looks for what is wrong in the memory of a stopped machine."""

_LOOK: Final = 0.1
"""Seconds between two looks at the machine."""


class Host:
    """Hosts the machine of *config* inside a ``with`` block.

    The guest starts at once; with *incoming*, a URI, it is one that is migrated to there instead,
    or with ``defer`` to where a client of the monitor says.  *monitor* is the path of a unix socket
    for QMP.  *serial* is called with what the guest sends on its serial port, by a thread that must
    not be kept waiting; *warned* with what an operator should know of a migration that goes on.

    Inside the block: ``machine``; ``control``, to migrate it; ``console``, what the guest's lines
    mean; ``address``, where a machine is waited for, or ``None``.
    """

    def __init__(
        self,
        config: MachineConfig,
        *,
        incoming: str | None = None,
        monitor: str | os.PathLike[str] | None = None,
        serial: Callable[[bytes], None] | None = None,
        warned: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._incoming = incoming
        self._monitor = monitor
        self._serial = serial
        self._warned = warned
        self._server: QmpServer | None = None
        self._reasons: SimpleQueue[str] = SimpleQueue()
        self._cleanup = ExitStack()
        self.console = Console()
        self.address: str | None = None

    def __enter__(self) -> Self:
        with self._cleanup as cleanup:  # undone here, unless everything below succeeds
            self._start(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _start(self, cleanup: ExitStack) -> None:
        if self._incoming == DEFER and self._monitor is None:
            raise UsageError("to wait until migrate-incoming says where, a monitor is needed")
        awaited = self._incoming is not None
        self.machine: HostedMachine = cleanup.enter_context(
            create(
                self._config,
                serial=self._take_serial,
                io_error=self._io_failed,
                # With a record of the owner nothing is touched before that is known.
                awaited=awaited or self._config.owner_store is not None,
            )
        )
        ownership = self._owned()
        if ownership is not None:
            cleanup.callback(ownership.close)
        self.control = Control(
            self.machine, notify=self._notify, awaited=awaited, ownership=ownership
        )
        cleanup.callback(self.control.close)
        if ownership is not None:
            if awaited:
                ownership.await_machine()
            else:
                ownership.claim()
        if self._monitor is not None:
            commands = machine_commands(self.control, uuid=self._config.uuid)
            commands[CHECK] = Command(lambda _: self._check())
            commands["query-block"] = Command(
                lambda _: query_block(self.machine, self.control.bitmaps), at_once=True
            )
            commands |= self._disk_commands(cleanup)
            self._server = cleanup.enter_context(
                QmpServer(self._monitor, commands, greeting=GREETING, leave=self._quit)
            )
        if self._incoming is None:
            if ownership is None:
                self.machine.start()
            elif not ownership.carry_out(self._begin):
                raise StorageError(f"{ownership.store.uri}: the lease lapsed before the start")
        elif self._incoming != DEFER:
            self.address = self.control.incoming(self._incoming)

    def _disk_commands(self, cleanup: ExitStack) -> dict[str, Command]:
        """To mirror the disks, or to have them filled by mirrors."""
        pairs = zip(self.machine.disks, self._config.disk, strict=True)
        served = {disk.name: Served(disk.image, one.file, one.format) for disk, one in pairs}
        exports = Exports(
            served,
            lambda: self.control.run_state is RunState.INMIGRATE,
            self.control.check_disks_may_move,
        )
        cleanup.callback(exports.close)
        jobs = BlockJobs(self.machine.images, self._notify)
        cleanup.callback(jobs.close)
        return jobs.commands() | exports.commands()

    def _owned(self) -> Ownership | None:
        config = self._config
        if config.owner_store is None:
            return None
        return Ownership(
            open_store(config.owner_store),
            vm=str(config.uuid or self.machine.name),
            pause=self._stand_still,
            resume=self._go_on,
            doubt=lambda why: self.control.doubted(why),  # noqa: PLW0108  (it comes to be later)
        )

    def _begin(self) -> None:
        activate_all(self.machine.images)
        self.machine.start()

    def _stand_still(self) -> bool:
        """Stop the machine, and leave its images to whoever may have them; whether it ran."""
        ran = self.machine.running
        with suppress(MachineError):
            self.machine.pause()
        # A migration that waited for the same, and was given up, lets it run again at that moment.
        self.machine.pause()
        inactivate_all(self.machine.images)
        return ran

    def _go_on(self) -> None:
        activate_all(self.machine.images)
        self.machine.resume()

    @property
    def state(self) -> str:
        """QEMU's run state of the machine, or ``in-doubt`` where it may run on the other side."""
        return IN_DOUBT if self.control.in_doubt else str(self.control.run_state)

    def wait(self, changed: Callable[[str], None] | None = None) -> str:
        """Wait until the machine is over; why it is, as ``host-qmp-quit``.

        *changed* is told the state at first and whenever it is another one.  Raises MachineError
        where the machine cannot go on, or its guest has found something wrong; and whatever went
        wrong where a machine was waited for that did not come.
        """
        seen = ""
        reason = ERROR
        try:
            while True:
                if changed is not None and seen != (seen := self.state):
                    changed(seen)
                if (ended := self._look()) is not None:
                    reason = ended
                    return reason
        finally:
            self._notify("SHUTDOWN", {"guest": reason == GUEST, "reason": reason})

    def cancel(self) -> None:
        """Let :meth:`wait` return, with ``host-signal``; from any thread."""
        self._reasons.put(SIGNAL)

    def _look(self) -> str | None:
        """Why the machine is over, if it is by now or within a moment."""
        try:
            return self._reasons.get(timeout=_LOOK)
        except Empty:
            pass
        control = self.control
        is_awaited = control.run_state is RunState.INMIGRATE
        if is_awaited and control.status is Status.FAILED and not control.in_doubt:
            raise control.error or MachineError("the machine did not come")
        status = self.machine.wait(0)
        if status is None:
            return None
        self.console.check()
        if status:
            raise MachineError(f"the guest ended with status {status}")
        return GUEST

    # Called by other threads

    def _check(self) -> Object:
        """What is wrong in the memory of the machine, which has to stand still."""
        machine = self.machine
        if any(block.has_missing for block in machine.memory.blocks):
            raise UsageError("the memory of the machine is still on its way: wait for all of it")
        findings = [] if machine.running else check(machine.memory, self._config)
        if machine.running:
            raise UsageError("the machine runs, so that its memory cannot be checked: stop it")
        return {"findings": [str(finding) for finding in findings]}

    def _io_failed(self, error: IoError) -> None:
        self._notify("BLOCK_IO_ERROR", block_io_error(error))
        if error.stops():
            # This is the thread of the disk, for which a pause waits.
            stop = partial(self.control.io_error, error.stops)
            threading.Thread(target=stop, name="io-error", daemon=True).start()

    def _quit(self) -> None:
        self._reasons.put(QUIT)

    def _take_serial(self, data: bytes) -> None:
        self.console.feed(data)
        if self._serial is not None:
            self._serial(data)

    def _notify(self, event: str, data: dict[str, Any]) -> None:
        if event == WARNING and self._warned is not None:
            self._warned(data["message"])
        if self._server is not None:
            self._server.emit(event, data)
