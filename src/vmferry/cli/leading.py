"""What ``vmferry migrate`` does: a migration that two other processes carry out, led from here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from vmferry.qemu import Migration, MigrationInfo, Qmp
from vmferry.qemu.mirror import Both, Copied, StorageCopy, nbd_place
from vmferry.qemu.postcopy import When, postcopy
from vmferry.qemu.waiting import WaitingQemu, listen_again
from vmferry.units import format_size

from .output import one_line
from .reports import Reporter
from .signals import Work

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
        led = self.copy_storage or self.postcopy is not None
        what = "--copy-storage" if self.copy_storage else "postcopy"
        needs_other = led or self.resume or self.with_disks
        others = "--copy-storage, --capability block, --postcopy and --resume"
        rules = {
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
        qmp = stack.enter_context(Qmp.connect(wanted.monitor))
        migration = Migration(qmp)
        if wanted.copy_storage:
            return _with_storage(wanted, report, control, migration, qmp, stack)
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
    control.begun(Both(copy, migration))
    copy.wait_ready(copied)
    migration.begin(
        wanted.uri,
        capabilities=wanted.capabilities,
        parameters=wanted.parameters,
        before_switchover=copy.finish,
    )
    return migration.wait(watched)


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
