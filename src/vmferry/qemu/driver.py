"""Driving a migration by QMP, of a QEMU or of a machine that vmferry hosts.

Both answer the same commands, so nothing here asks which of them it is.  The machine migrates by
itself; whoever drives it may go away without harm, and another may ask how far it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vmferry.errors import PeerError, UsageError, VmferryError, printable
from vmferry.qemu.info import MigrationInfo
from vmferry.qemu.parameters import read_parameters
from vmferry.qemu.postcopy import CAPABILITY, When
from vmferry.qemu.qmp import Qmp

_POLL: Final = 0.05
"""Seconds between two questions for the state of a migration."""

_SETTLED: Final = 10.0
"""Seconds that a source may take to run again after its migration has ended."""


class MigrationCancelled(PeerError):
    """The migration was cancelled, from here or by someone else; the source keeps the machine."""


@dataclass(frozen=True, slots=True)
class MachineStatus:
    """What a machine does.

    ``run_state`` is QEMU's word for it (``running``, ``paused``, ``inmigrate``, ``postmigrate``,
    ...).  ``name`` is empty where the machine has none.  ``listening`` has the addresses at which
    it waits for a machine to come, as migration URIs.
    """

    run_state: str
    is_running: bool
    name: str
    migration: MigrationInfo
    listening: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``, under the same names."""
        return {
            "run_state": self.run_state,
            "is_running": self.is_running,
            "name": self.name,
            "migration": self.migration.to_json(),
            "listening": list(self.listening),
        }


def query_machine(qmp: Qmp) -> MachineStatus:
    """What the machine behind *qmp* does right now."""
    run = _object(qmp, "query-status")
    migration = _object(qmp, "query-migrate")
    return MachineStatus(
        run_state=str(run.get("status", "unknown")),
        is_running=run.get("running") is True,
        name=str(_object(qmp, "query-name").get("name", "")),
        migration=MigrationInfo.from_qmp(migration),
        listening=_addresses(migration.get("socket-address")),
    )


class Migration:
    """One migration of the machine behind *qmp*: :meth:`begin` it, then :meth:`wait` for its end.

    Both are for one thread; any other may :meth:`cancel`.  ``last`` is the latest that was seen.
    """

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp
        self._unwanted = False
        self._woken = threading.Event()
        self._is_confirmed = False
        self._before_switchover: Callable[[], None] | None = None
        self._postcopy: When | None = None
        self.last = MigrationInfo()

    def begin(
        self,
        uri: str,
        *,
        capabilities: Mapping[str, bool] | None = None,
        parameters: Mapping[str, object] | None = None,
        before_switchover: Callable[[], None] | None = None,
        postcopy: When | None = None,
    ) -> None:
        """Set *capabilities* and *parameters*, the others stay as they are; then start.

        *uri* is for the machine to read: paths and descriptors are those of its process.
        Parameters that are texts may have units, see :func:`read_parameters`.
        *before_switchover* is called by :meth:`wait` when the machine has stopped and before it is
        given away; where it raises, the migration is cancelled.  *postcopy* says when the machine
        is to go before its memory, which needs the capability postcopy-ram on the other side, too.

        Raises UsageError where a parameter cannot be read or a migration is under way already,
        QmpError where the machine refuses.  The machine runs on in either case.
        """
        if (now := self.look()).is_under_way:
            raise UsageError(
                f"expected a machine that does not migrate, found a migration that is {now.status}"
            )
        if postcopy is not None:
            capabilities = {CAPABILITY: True} | dict(capabilities or {})
        self._postcopy = postcopy
        if capabilities:
            changes = [{"capability": name, "state": on} for name, on in capabilities.items()]
            self._qmp.execute("migrate-set-capabilities", {"capabilities": changes})
        if parameters:
            current = _object(self._qmp, "query-migrate-parameters")
            self._qmp.execute("migrate-set-parameters", read_parameters(parameters, current))
        self._before_switchover = before_switchover
        if before_switchover is not None:
            pause = {"capability": "pause-before-switchover", "state": True}
            self._qmp.execute("migrate-set-capabilities", {"capabilities": [pause]})
        self._is_confirmed = bool({"return-path", CAPABILITY} & self._enabled())
        if self._unwanted:
            raise MigrationCancelled("the migration was cancelled before it began")
        self._qmp.execute("migrate", {"uri": uri})

    def resume(self, uri: str) -> None:
        """Go on with a migration whose status is ``postcopy-paused``, at *uri*; then :meth:`wait`.

        The other side has to listen there again (``migrate-recover``).
        """
        if (now := self.look()).status != "postcopy-paused":
            raise UsageError(
                f"expected a migration that is postcopy-paused, found one that is"
                f" {printable(now.status)}"
            )
        self._is_confirmed = True
        self._qmp.execute("migrate", {"uri": uri, "resume": True})

    def wait(self, progress: Callable[[MigrationInfo], None] | None = None) -> MigrationInfo:
        """Wait until it has completed, with a report to *progress* for each look at it.

        Raises PeerError with the machine's reason where it fails, :class:`MigrationCancelled`;
        TransportError where the monitor goes away, which leaves the outcome unknown.
        """
        told = False
        while not (now := self.look()).has_ended:
            try:
                if progress:
                    progress(now)
                self._reached(now)
            except PeerError:
                self._give_up()
                raise
            if self._unwanted and not told:
                self._tell(now)
                told = True
            self._woken.wait(_POLL)
            self._woken.clear()
        return self._judged(now)

    def _reached(self, now: MigrationInfo) -> None:
        """Do what is to be done at this moment of it, once."""
        if now.status == "active" and self._postcopy is not None and self._postcopy.is_due(now):
            self._postcopy = None
            self._qmp.execute("migrate-start-postcopy")
        if now.status == "pre-switchover" and self._before_switchover is not None:
            last, self._before_switchover = self._before_switchover, None
            last()
            self._qmp.execute("migrate-continue", {"state": "pre-switchover"})

    def _give_up(self) -> None:
        """Cancel it, and wait until the machine runs again."""
        self._qmp.execute("migrate_cancel")
        while not self.look().has_ended:
            time.sleep(_POLL)

    def look(self) -> MigrationInfo:
        """How far it is."""
        self.last = MigrationInfo.from_qmp(_object(self._qmp, "query-migrate"))
        return self.last

    def cancel(self) -> None:
        """Ask for it to be cancelled, from any thread; :meth:`wait` tells how it ended."""
        self._unwanted = True
        self._woken.set()

    def _tell(self, now: MigrationInfo) -> None:
        if now.is_postcopy:
            raise PeerError(
                "a migration in postcopy cannot be cancelled, as the machine runs on the other "
                "side already; it goes on"
            )
        self._qmp.execute("migrate_cancel")

    def _judged(self, end: MigrationInfo) -> MigrationInfo:
        match end.status:
            case "completed" | "sent":
                return replace(end, confirmed=self._is_confirmed)
            case "cancelled":
                raise MigrationCancelled(f"the migration was cancelled{self._remains()}")
            case _:
                reason = end.error or "the machine gives no reason; the other side may have told it"
                raise PeerError(f"the migration failed: {_plain(reason)}{self._remains()}")

    def _enabled(self) -> set[str]:
        """The capabilities that are on."""
        found = self._qmp.execute("query-migrate-capabilities")
        if not isinstance(found, list):
            raise PeerError("expected a list of capabilities, found another value")
        return {
            str(entry.get("capability"))
            for entry in found
            if isinstance(entry, dict) and entry.get("state") is True
        }

    def _remains(self) -> str:
        """What became of the machine, where it can be asked."""
        deadline = time.monotonic() + _SETTLED
        try:
            while True:
                state = str(_object(self._qmp, "query-status").get("status"))
                if state != "finish-migrate" or time.monotonic() > deadline:
                    return f"; the source is {_plain(state)}"
                time.sleep(_POLL)
        except VmferryError:
            return ""


def _object(qmp: Qmp, command: str) -> dict[str, Any]:
    answer = qmp.execute(command)
    if not isinstance(answer, dict):
        raise PeerError(f"expected an object as the answer to {command}, found another value")
    return answer


def _addresses(found: object) -> tuple[str, ...]:
    """Migration URIs for QEMU's ``socket-address``."""
    if not isinstance(found, list):
        return ()
    uris = []
    for address in found:
        match address:
            case {"type": "unix", "path": str(path)}:
                uris.append(f"unix:{path}")
            case {"type": "inet", "host": str(host), "port": str(port)}:
                uris.append(f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}")
    return tuple(uris)


def _plain(text: str) -> str:
    return text if text.isprintable() else printable(text, 500)
