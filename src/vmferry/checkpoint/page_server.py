"""One process that many machines get their memory from: any number of restores of a checkpoint.

It is asked by QMP, as a machine is (:mod:`vmferry.qemu.server`), for ``restore``,
``query-restores``, ``query-checkpoint`` and ``quit``.  Guest memory is read through the page cache,
which all restores share; the process itself holds none of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Self

from vmferry.errors import UsageError, VmferryError
from vmferry.migration.postcopy.source import Paused
from vmferry.migration.progress import Progress
from vmferry.qemu.commands import Command
from vmferry.qemu.messages import Object
from vmferry.qemu.monitor import GREETING
from vmferry.qemu.qmp import Qmp
from vmferry.qemu.server import QmpServer

from .checkpoint import Checkpoint
from .order import ARGUMENTS, Order
from .restore import Restored

MAX_RESTORES: Final = 256
"""Restores under way at once, and clients."""

_REMEMBERED: Final = 1024
"""Restores of which is told how they went."""


class _Served:
    """One restore."""

    def __init__(self, number: int, order: Order) -> None:
        self.number = number
        self.order = order
        self._progress = Progress("setup")
        self._lost = ""
        self._error: VmferryError | None = None
        self._outcome: Restored | None = None

    @property
    def status(self) -> str:
        """A migration's status, as the source's."""
        if self._outcome is not None:
            return "completed"
        if self._error is not None:
            return "postcopy-paused" if isinstance(self._error, Paused) else "failed"
        # A connection that broke is taken up again.
        phase = self._progress.phase
        return {"failed": "postcopy-recover", "completed": "loading"}.get(phase, phase)

    @property
    def is_under_way(self) -> bool:
        """Whether it is served."""
        return self._outcome is None and self._error is None

    def run(self, checkpoint: Checkpoint) -> None:
        """Serve it."""
        order = self.order
        try:
            with ExitStack() as cleanup:
                qmp = None if order.qmp is None else cleanup.enter_context(Qmp.connect(order.qmp))
                restore = order.restore(checkpoint, qmp, self._report, self._paused)
                self._outcome = restore.run()
        except VmferryError as error:
            self._error = error
        except Exception as error:  # noqa: BLE001 - whoever asks is told, and others are served
            self._error = VmferryError(f"this is a bug in vmferry: {error!r}")

    def _report(self, now: Progress) -> None:
        self._progress = now

    def _paused(self, error: Paused) -> None:
        self._lost = str(error)

    def to_json(self) -> Object:
        """What ``query-restores`` tells of it."""
        told: Object = {
            "id": self.number,
            "uri": self.order.uri,
            "status": self.status,
            "under-way": self.is_under_way,
            "progress": asdict(self._progress),
        }
        if why := str(self._error or self._lost):
            told["error-desc"] = why
        if self._outcome is not None:
            told["result"] = self._outcome.to_json()
        return told


class PageServer:
    """Serves *checkpoint* to whoever asks at *path*, from its creation until it is closed.

    A context manager.  *told* hears of each restore that began or ended, as ``query-restores``
    tells of it, in the threads of the restores.  Raises as
    :class:`~vmferry.qemu.server.QmpServer`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        path: str | os.PathLike[str],
        *,
        told: Callable[[Object], None] = lambda _: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._told = told
        self._changed = threading.Condition()
        self._restores: dict[int, _Served] = {}
        self._numbers = 0
        self._serving = 0
        self._is_ending = False
        commands = {
            "restore": Command(self._restore, required={"uri": str}, optional=ARGUMENTS),
            "query-restores": Command(self._query, optional={"id": int}, at_once=True),
            "query-checkpoint": Command(lambda _: self._describe(), at_once=True),
        }
        self._server = QmpServer(
            path, commands, greeting=GREETING, leave=self.cancel, clients=MAX_RESTORES
        )

    def cancel(self) -> bool:
        """End as soon as no restore is under way, and begin no more; from any thread."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        return True

    def wait(self) -> None:
        """Return when it was told to end, and nobody depends on it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending and not self._serving)

    def close(self) -> None:
        """Be asked no more.  Restores that are under way go on, in threads of this process."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Commands

    def _restore(self, arguments: Object) -> Object:
        order = Order.from_arguments(arguments)
        with self._changed:
            if self._is_ending:
                raise UsageError("the page server ends when nobody depends on it any more")
            if self._serving >= MAX_RESTORES:
                raise UsageError(f"{MAX_RESTORES} restores are under way, which is the most")
            self._numbers += 1
            self._serving += 1
            served = _Served(self._numbers, order)
            self._restores[served.number] = served
            for number in [n for n, s in self._restores.items() if not s.is_under_way]:
                if len(self._restores) <= _REMEMBERED:
                    break
                del self._restores[number]
        threading.Thread(target=self._serve, args=(served,), daemon=True).start()
        return {"id": served.number}

    def _serve(self, served: _Served) -> None:
        try:
            self._told(served.to_json())
            served.run(self._checkpoint)
            self._told(served.to_json())
        finally:
            with self._changed:
                self._serving -= 1
                self._changed.notify_all()

    def _query(self, arguments: Object) -> list[Object]:
        with self._changed:
            found = list(self._restores.values())
        number = arguments.get("id")
        if number is not None and number not in {served.number for served in found}:
            raise UsageError(f"there is no restore {number}")
        return [served.to_json() for served in found if number in {None, served.number}]

    def _describe(self) -> dict[str, Any]:
        configuration = self._checkpoint.configuration
        return {
            "directory": str(Path(self._checkpoint.path).resolve()),
            "machine": None if configuration is None else configuration.machine,
        }
