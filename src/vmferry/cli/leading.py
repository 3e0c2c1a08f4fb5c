"""What ``vmferry migrate`` does: a migration that two other processes carry out, led from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

from vmferry.errors import PeerError, TransportError, VmferryError
from vmferry.ownership.file_store import FileStore
from vmferry.qemu import Migration, MigrationInfo, Qmp
from vmferry.qemu.mirror import Copied, StorageCopy, nbd_place
from vmferry.qemu.owned import CAPABILITIES, OwnedMove, record_for_qemus
from vmferry.qemu.postcopy import When, postcopy
from vmferry.qemu.waiting import WaitingQemu, listen_again
from vmferry.units import format_size

from .output import one_line
from .reports import Reporter
from .signals import Cancellable, Work

BLOCK: Final = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for on the command line."""

    monitor: str
    uri: str
    capabilities: Mapping[str, bool]
    parameters: Mapping[str, str]
    watch: bool
    postcopy: When | None
    resume: bool
    copy_storage: bool
    destination: str | None
    nbd: str | None
    incremental: bool
    record: str | None
    settle: bool

    @property
    def with_disks(self) -> bool:
        """Whether the disks move along in the stream."""
        return self.capabilities.get(BLOCK, False)

    @property
    def of_destination(self) -> list[str]:
        """The capabilities that the other side needs to be told of."""
        preempt = self.capabilities.get("postcopy-preempt", False)
        following = postcopy(preempt=preempt) if self.postcopy is not None else []
        return [*following, *([BLOCK] if self.with_disks else [])]

    @property
    def of_both(self) -> dict[str, object]:
        """The parameters that count on both sides."""
        return {"block-incremental": True} if self.with_disks and self.incremental else {}

    def wrong(self) -> str:
        """What does not go together; nothing if all does."""
        has_record = self.record is not None
        led = self.copy_storage or self.postcopy is not None or has_record
        what = "--copy-storage" if self.copy_storage else "--record" if has_record else "postcopy"
        needs_other = led or self.resume or self.with_disks
        others = "--copy-storage, --capability block, --postcopy, --record and --resume"
        rules = {
            "--record needs --destination-qmp": has_record and self.destination is None,
            "--record is for images that both sides share, and for precopy": has_record
            and (self.copy_storage or self.with_disks or self.postcopy or self.resume),
            "--settle needs --record": self.settle and not has_record,
            "--copy-storage needs --destination-qmp": self.copy_storage
            and self.destination is None,
            f"--destination-qmp is for {others}": self.destination is not None and not needs_other,
            "--resume goes on with what was begun, which no other option changes": self.resume
            and (led or self.capabilities),
            "--copy-storage cannot go with postcopy": self.copy_storage and self.postcopy,
            f"{what} has to watch the migration": led and not self.watch,
            "--incremental is for --copy-storage and --capability block": self.incremental
            and not (self.copy_storage or self.with_disks),
        }
        return next((rule for rule, is_broken in rules.items() if is_broken), "")


def carried_out(wanted: Wanted, report: Reporter[Any], control: Work) -> MigrationInfo:
    """Begin it or go on with it, and where it is to be watched wait for its end."""

    def seen(now: MigrationInfo) -> None:
        _tell(now, report)

    with ExitStack() as stack:
        store = None
        if wanted.record is not None:
            store = record_for_qemus(wanted.record)
            stack.enter_context(store.lead())
        if store is not None and wanted.settle:
            return _settled(wanted, report, control, store, stack)
        qmp = stack.enter_context(Qmp.connect(wanted.monitor))
        migration = Migration(qmp)
        if wanted.copy_storage:
            return _with_storage(wanted, report, control, migration, qmp, stack)
        if store is not None:
            return _with_record(wanted, report, control, migration, store, qmp, stack)
        control.begun(migration)
        if wanted.resume:
            if wanted.destination is not None:
                listen_again(stack.enter_context(Qmp.connect(wanted.destination)), wanted.uri)
            migration.resume(wanted.uri)
        else:
            if wanted.destination is not None:
                other = stack.enter_context(Qmp.connect(wanted.destination))
                WaitingQemu(other).listen(
                    wanted.uri, wanted.of_destination, parameters=wanted.of_both
                )
            migration.begin(
                wanted.uri,
                capabilities=wanted.capabilities,
                parameters={**wanted.parameters, **wanted.of_both},
                postcopy=wanted.postcopy,
            )
        return migration.wait(seen) if wanted.watch else migration.look()


def _with_storage(
    wanted: Wanted,
    report: Reporter[Any],
    control: Work,
    migration: Migration,
    qmp: Qmp,
    stack: ExitStack,
) -> MigrationInfo:
    """Its disks are copied along."""

    def copied(now: Copied) -> None:
        content = {"done": now.done, "total": now.total}
        text = f"disks: {format_size(now.done)} of {format_size(now.total)} copied"
        report.happened("copied", text, **content)

    def watched(now: MigrationInfo) -> None:
        copy.look()
        _tell(now, report)

    other = stack.enter_context(Qmp.connect(wanted.destination or ""))
    place = wanted.nbd or nbd_place(wanted.uri)
    copy = stack.enter_context(StorageCopy(qmp, other, place, incremental=wanted.incremental))
    control.begun(_Together(copy, migration))
    copy.wait_ready(copied)
    migration.begin(
        wanted.uri,
        capabilities=wanted.capabilities,
        parameters=wanted.parameters,
        before_switchover=copy.finish,
    )
    return migration.wait(watched)


def _with_record(
    wanted: Wanted,
    report: Reporter[Any],
    control: Work,
    migration: Migration,
    store: FileStore,
    qmp: Qmp,
    stack: ExitStack,
) -> MigrationInfo:
    """By a record of who owns the machine, which both QEMUs are kept to."""
    other = stack.enter_context(Qmp.connect(wanted.destination or ""))
    move = OwnedMove(store, qmp, other, note=_noting(report))
    control.begun(_Together(move, migration))
    move.begin(qmp)
    # Told to stop while it waits, it does not start by itself.
    WaitingQemu(other).listen(wanted.uri, CAPABILITIES, paused=True)
    migration.begin(
        wanted.uri,
        capabilities={**wanted.capabilities, **CAPABILITIES},
        parameters=wanted.parameters,
        before_switchover=move.offer,
    )
    try:
        migration.wait(lambda now: _tell(now, report))
    except VmferryError as error:
        if not move.settle():
            raise
        report.happened("moved", f"the machine has moved all the same: {one_line(str(error))}")
    else:
        _settle(move)
    return migration.last


def _settled(
    wanted: Wanted, report: Reporter[Any], control: Work, store: FileStore, stack: ExitStack
) -> MigrationInfo:
    """A move by record that was broken off."""

    def reached(address: str) -> Qmp | None:
        with suppress(TransportError):
            return stack.enter_context(Qmp.connect(address))
        return None

    qmp, other = reached(wanted.monitor), reached(wanted.destination or "")
    move = OwnedMove(store, qmp, other, note=_noting(report))
    control.begun(move)
    _settle(move)
    return MigrationInfo("completed") if qmp is None else Migration(qmp).look()


def _settle(move: OwnedMove) -> None:
    if not move.settle():
        raise PeerError("the machine has not moved: it is the source's, as the record says")


def _noting(report: Reporter[Any]) -> Callable[[str], None]:
    return lambda text: report.happened("ownership", one_line(text), message=text)


class _Together:
    """Some things that are cancelled as one."""

    def __init__(self, *parts: Cancellable) -> None:
        self._parts = parts

    def cancel(self) -> None:
        """Give all of them up, from any thread."""
        for part in self._parts:
            part.cancel()


def _tell(now: MigrationInfo, report: Reporter[Any]) -> None:
    if now.stall and now.stall != report.last.stall:
        report.happened("stalled", one_line(now.stall), message=now.stall)
    if now.status == "postcopy-paused" != report.last.status:
        why = f": {one_line(now.error)}" if now.error else ""
        text = (
            f"paused{why}; the machine waits on the other side for its memory: have it listen again"
            " (migrate-recover), and vmferry migrate --resume goes on"
        )
        report.happened("paused", text, message=now.error)
    report.progress(now)
