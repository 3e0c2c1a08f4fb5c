"""Disks that move with a machine by mirrors over NBD, between QEMUs or machines of vmferry.

What libvirt does for ``--copy-storage-all``: the destination serves its empty disks by NBD, the
source mirrors its own onto them until both are alike, and the mirrors end at the moment between the
stop of the machine and the switchover (QEMU's ``docs/interop/live-block-operations.rst``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

from vmferry.errors import PeerError, Refused, TransportError, UsageError, VmferryError, printable
from vmferry.transports.uri import TcpAddress, UnixAddress, parse
from vmferry.units import format_size

from .qmp import Qmp, QmpError

_POLL: Final = 0.05
_JOB: Final = "vmferry-mirror-{}"
_TARGET: Final = "vmferry-target-{}"
_EXPORT: Final = "vmferry-{}"
_SETTLE: Final = 60.0
"""Seconds that a mirror may take to end, once nothing is written any more."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk; ``key`` is what both sides call it, ``node`` what it is there."""

    key: str
    node: str
    size: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class Copied:
    """How far the mirrors are, in bytes over all disks."""

    done: int
    total: int
    is_ready: bool


class StorageCopy:
    """Copies the disks of the machine behind *source* to the one behind *destination*.

    *place* is where the destination serves them meanwhile, a URI ``unix:PATH`` or
    ``tcp:HOST:PORT`` as both machines read it.  With *incremental* only what lies above backing
    files is copied, which both sides have.

    A context manager: when it is left, nothing of it is left on either side.  Raises
    :class:`Refused` where the disks of the two do not match, before anything was changed, and
    :class:`PeerError` with a disk's name and the reason where a mirror fails.
    """

    def __init__(
        self, source: Qmp, destination: Qmp, place: str, *, incremental: bool = False
    ) -> None:
        self._source = source
        self._destination = destination
        self._server = _address(place)
        self._sync = "top" if incremental else "full"
        self._pairs = list(_pairs(source, destination))
        self._cleanup = ExitStack()
        self._active: set[int] = set()
        self._unwanted = False

    @property
    def names(self) -> list[str]:
        """What is copied."""
        return [here.key for here, _ in self._pairs]

    def __enter__(self) -> Self:
        with self._cleanup as cleanup:
            self._begin(cleanup)
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def _begin(self, cleanup: ExitStack) -> None:
        there, here = self._destination, self._source
        try:
            there.execute("nbd-server-start", {"addr": self._server})
        except QmpError as error:
            if "running" not in error.description:
                raise
            raise Refused(
                f"{error} (another copy is under way, or one that was killed has left it: start the"
                " destination anew, or give its monitor nbd-server-stop)"
            ) from error
        cleanup.callback(_quietly, there, "nbd-server-stop")
        for number, (disk, target) in enumerate(self._pairs):
            export = {"type": "nbd", "id": _EXPORT.format(number), "node-name": target.node}
            export |= {"name": _EXPORT.format(number)}
            there.execute("block-export-add", export | {"writable": True})
            cleanup.callback(
                _quietly, there, "block-export-del", {"id": export["id"], "mode": "hard"}
            )
            self._forget(number)
            node = {"driver": "nbd", "node-name": _TARGET.format(number)}
            node |= {"server": {"type": self._server["type"]} | self._server["data"]}
            here.execute("blockdev-add", node | {"export": export["name"]})
            cleanup.callback(_quietly, here, "blockdev-del", {"node-name": node["node-name"]})
            job = {"job-id": _JOB.format(number), "device": disk.node, "sync": self._sync}
            errors = {"on-source-error": "report", "on-target-error": "report"}
            here.execute(
                "blockdev-mirror",
                job | errors | {"target": node["node-name"], "auto-dismiss": False},
            )
            self._active.add(number)
            cleanup.callback(self._drop, number)

    def look(self) -> Copied:
        """How far it is; raises where a mirror has failed."""
        jobs = self._jobs()
        done = total = 0
        ready = True
        for number in sorted(self._active):
            job = jobs.get(_JOB.format(number)) or {}
            self._check(number, job)
            done += int(job["current-progress"])
            total += int(job["total-progress"])
            ready &= job["status"] == "ready"
        return Copied(done, total, ready)

    def wait_ready(self, progress: Callable[[Copied], None] = lambda _: None) -> None:
        """Return once both sides are alike, and stay so."""
        while not (now := self.look()).is_ready:
            progress(now)
            if self._unwanted:
                raise PeerError("copying the disks was cancelled; the source runs on")
            time.sleep(_POLL)
        progress(now)

    def cancel(self) -> None:
        """Give up waiting, from any thread."""
        self._unwanted = True

    def finish(self) -> None:
        """End the mirrors: the machine is stopped, and what they have copied is all there is.

        Then the destination's disks belong to nobody but the destination.
        """
        for number in sorted(self._active):
            self._source.execute("block-job-cancel", {"device": _JOB.format(number)})
        deadline = time.monotonic() + _SETTLE
        while pending := [n for n in sorted(self._active) if not self._concluded(n)]:
            if time.monotonic() > deadline:
                raise TransportError(
                    f"the mirror of {printable(self._pairs[pending[0]][0].key)} does not end"
                )
            time.sleep(_POLL / 5)
        self._active.clear()
        self._cleanup.close()

    def _concluded(self, number: int) -> bool:
        job = self._jobs().get(_JOB.format(number)) or {}
        if job.get("status", "null") not in {"concluded", "null"}:
            return False
        if not job or job.get("error"):  # who forgot it may have ended it before, as no copy
            self._check(number, job)
        return True

    def _check(self, number: int, job: dict[str, Any]) -> None:
        """Raise where a mirror has ended by itself."""
        if job.get("status", "null") not in {"concluded", "aborting", "null"}:
            return
        reason = job.get("error") or "it has ended, and gives no reason"
        name = printable(self._pairs[number][0].key)
        raise PeerError(f"the mirror of disk {name} failed: {printable(str(reason), 300)}")

    def _jobs(self) -> dict[str, Any]:
        return {job["id"]: job for job in self._source.execute("query-jobs")}

    def _forget(self, number: int) -> None:
        """Take away what an earlier copy that was killed has left, where it is of no use."""
        name = _JOB.format(number)
        if (self._jobs().get(name) or {}).get("status") == "concluded":
            _quietly(self._source, "job-dismiss", {"id": name})
        _quietly(self._source, "blockdev-del", {"node-name": _TARGET.format(number)})

    def _drop(self, number: int) -> None:
        """End a mirror, if it is still there, and forget it."""
        name = _JOB.format(number)
        with suppress(VmferryError):
            if number in self._active:
                self._source.execute("block-job-cancel", {"device": name, "force": True})
        deadline = time.monotonic() + _SETTLE
        with suppress(VmferryError):
            while (job := self._jobs().get(name)) and time.monotonic() < deadline:
                if job["status"] == "concluded":
                    self._source.execute("job-dismiss", {"id": name})
                time.sleep(_POLL / 5)


def nbd_place(uri: str) -> str:
    """Where the disks of a machine that waits at *uri* can be served, if nothing else is said."""
    match parse(uri):
        case UnixAddress(path):
            return f"unix:{path}.nbd"
        case TcpAddress(host):
            return f"tcp:[{host}]:{_PORT}" if ":" in host else f"tcp:{host}:{_PORT}"
    raise UsageError("say with --nbd where the other machine is to serve its disks")


_PORT: Final = 10809


def _pairs(source: Qmp, destination: Qmp) -> Iterator[tuple[Disk, Disk]]:
    """The disks of both sides, matched; all of the source's that can be written."""
    there = {disk.key: disk for disk in _disks(destination)}
    found = False
    for disk in _disks(source):
        if disk.read_only:
            continue
        found = True
        other = there.get(disk.key)
        name = printable(disk.key)
        if other is None:
            raise Refused(f"the destination has no disk {name}: start it as the source was started")
        if other.read_only:
            raise Refused(f"the destination's disk {name} is read only")
        if other.size != disk.size:
            raise Refused(
                f"disk {name} has {format_size(disk.size)} here and {format_size(other.size)} at"
                " the destination: make an image of the same size"
            )
        yield disk, other
    if not found:
        raise UsageError("the machine has no disk that could be copied")


def _disks(qmp: Qmp) -> Iterator[Disk]:
    for entry in qmp.execute("query-block"):
        inserted = entry.get("inserted")
        if not isinstance(inserted, dict):
            continue
        node = str(inserted.get("node-name", ""))
        # A name that QEMU made up says nothing on the other side.
        named = node if node and not node.startswith("#") else ""
        key = str(entry.get("device") or named or entry.get("qdev") or "")
        size = inserted.get("image", {}).get("virtual-size", 0)
        yield Disk(key, node or key, int(size), bool(inserted.get("ro")))


def _address(place: str) -> dict[str, Any]:
    """A ``SocketAddressLegacy`` of QEMU."""
    match parse(place):
        case UnixAddress(path):
            return {"type": "unix", "data": {"path": path}}
        case TcpAddress(host, port) if host and port:
            return {"type": "inet", "data": {"host": host, "port": str(port)}}
    raise UsageError(f"expected unix:PATH or tcp:HOST:PORT for NBD, found {printable(place)}")


def _quietly(qmp: Qmp, command: str, arguments: dict[str, Any] | None = None) -> None:
    """Undo something; what is gone already, with its machine, need not be undone."""
    with suppress(QmpError, TransportError):
        qmp.execute(command, arguments)
