"""Mirrors of the disks of a hosted machine onto NBD servers, by the commands of QEMU.

QEMU 7.2 ``qapi/block-core.json`` and ``qapi/job.json``: what whoever moves disks beside a migration
asks for (``docs/interop/live-block-operations.rst``), and no more of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

from vmferry.errors import StorageError, UsageError, printable
from vmferry.images import Image
from vmferry.images.mirror import Mirror, MirrorStatus
from vmferry.images.nbd import NbdStorage
from vmferry.images.stored import StoredImage
from vmferry.migration.disks import disk_name

from .commands import Command, CommandError
from .messages import Object

_MOST: Final = 64
"""Nodes, and as many jobs."""

_PATIENCE: Final = 2.0
"""Seconds that a server has to answer the last request of a mirror that is cancelled."""

Emit = Callable[[str, dict[str, Any]], None]


@dataclass(slots=True)
class _Node:
    storage: NbdStorage
    image: Image

    def close(self) -> None:
        """Let it go; what a mirror has copied was flushed by the mirror."""
        with suppress(StorageError):
            self.image.close()


@dataclass(slots=True)
class _Job:
    mirror: Mirror
    node: _Node
    is_kept: bool
    """Whether it stays, when it has ended, until ``job-dismiss``."""


class BlockJobs:
    """The nodes and jobs of a machine with *images*; *emit* gets the events.

    :meth:`close` ends them all.  The images of a machine that runs are active; where they are not,
    a mirror fails, and says so.  A server that does not answer keeps waiting whoever asks for it,
    and no other command of the machine.
    """

    def __init__(self, images: Sequence[Image], emit: Emit) -> None:
        self._images = {disk_name(number): image for number, image in enumerate(images)}
        self._emit = emit
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = {}
        self._jobs: dict[str, _Job] = {}
        self._is_closed = False

    def commands(self) -> dict[str, Command]:
        """By name."""
        policies = {"on-source-error": str, "on-target-error": str, "auto-dismiss": bool}
        return {
            "blockdev-add": Command(
                self._add,
                required={"driver": str, "node-name": str, "server": dict},
                optional={"export": str},
                at_once=True,
            ),
            "blockdev-del": Command(self._delete, required={"node-name": str}, at_once=True),
            "blockdev-mirror": Command(
                self._mirror,
                required={"device": str, "target": str, "sync": str},
                optional={"job-id": str, **policies},
                at_once=True,
            ),
            "query-jobs": Command(lambda _: self._query(), at_once=True),
            "block-job-cancel": Command(
                self._cancel, required={"device": str}, optional={"force": bool}, at_once=True
            ),
            "job-dismiss": Command(self._dismiss, required={"id": str}, at_once=True),
        }

    def close(self) -> None:
        """End all jobs and let all nodes go, whether their servers answer or not."""
        with self._lock:
            self._is_closed = True
            jobs, nodes = list(self._jobs.values()), list(self._nodes.values())
        for job in jobs:
            job.mirror.cancel()
        for node in nodes:
            node.storage.abort()
        for job in jobs:
            job.mirror.wait()
        for node in nodes:
            node.close()

    # Nodes

    def _add(self, arguments: Object) -> None:
        name = arguments["node-name"]
        if arguments["driver"] != "nbd":
            raise UsageError(
                f"expected a node of the driver nbd, found {printable(arguments['driver'])}: other"
                " disks are given to the machine when it starts"
            )
        self._check_new(name)
        storage = NbdStorage(
            _uri(arguments["server"], arguments.get("export", "")), read_only=False
        )
        node = _Node(storage, StoredImage(storage, active=True))
        try:
            with self._lock:
                self._check_new(name)
                self._nodes[name] = node
        except UsageError:
            node.close()
            raise

    def _check_new(self, name: str) -> None:
        if self._is_closed:
            raise UsageError("the machine ends")
        if name in self._nodes or name in self._images:
            raise UsageError(f"there is a node {printable(name)} already")
        if len(self._nodes) >= _MOST:
            raise UsageError(f"there are {_MOST} nodes already, which is the most")

    def _delete(self, arguments: Object) -> None:
        name = arguments["node-name"]
        with self._lock:
            node = self._free(name)
            del self._nodes[name]
        node.close()

    def _free(self, name: str) -> _Node:
        """The node of that *name*, which nothing is copied to."""
        node = self._nodes.get(name)
        if node is None:
            raise UsageError(f"there is no node {printable(name)}")
        if any(job.node is node and not _has_ended(job) for job in self._jobs.values()):
            raise UsageError(f"node {printable(name)} is in use by a mirror: end that first")
        return node

    # Jobs

    def _mirror(self, arguments: Object) -> None:
        device, target, sync = arguments["device"], arguments["target"], arguments["sync"]
        name = str(arguments.get("job-id", device))
        image = self._images.get(device)
        if image is None:
            raise CommandError("DeviceNotFound", f"there is no disk {printable(device)}")
        if sync not in {"full", "top"}:
            raise UsageError(f"expected full or top as sync, found {printable(sync)}")
        for policy in ("on-source-error", "on-target-error"):
            if arguments.get(policy, "report") != "report":
                raise UsageError(f"expected report as {policy}: a mirror that fails has ended")
        with self._lock:
            if name in self._jobs:
                raise UsageError(f"there is a job {printable(name)} already")
            if len(self._jobs) >= _MOST:
                raise UsageError(f"there are {_MOST} jobs already, which is the most")
            node = self._free(target)
            mirror = Mirror(
                image,
                node.image,
                own=sync == "top",
                changed=lambda status: self._changed(name, status),
            )
            is_kept = not arguments.get("auto-dismiss", True)
            self._jobs[name] = _Job(mirror, node, is_kept)

    def _changed(self, name: str, status: MirrorStatus) -> None:
        self._emit("JOB_STATUS_CHANGE", {"id": name, "status": str(status)})
        with self._lock:  # whoever made it has noted it by then; it may have been dismissed
            job = self._jobs.get(name)
            if job is not None and _has_ended(job) and not job.is_kept:
                del self._jobs[name]

    def _query(self) -> list[Object]:
        with self._lock:
            jobs = dict(self._jobs)
        return [_told(name, job.mirror) for name, job in jobs.items()]

    def _cancel(self, arguments: Object) -> None:
        """Behind its first pass a mirror ends as a copy, unless it is ended by force."""
        job = self._job(arguments["device"])
        if job.mirror.status is MirrorStatus.READY and not arguments.get("force", False):
            job.mirror.finish()
            return
        job.mirror.cancel()
        if not job.mirror.wait(_PATIENCE):
            job.node.storage.abort()

    def _dismiss(self, arguments: Object) -> None:
        name = arguments["id"]
        with self._lock:
            if not _has_ended(self._job(name)):
                raise UsageError(f"job {printable(name)} has not ended: block-job-cancel ends it")
            del self._jobs[name]

    def _job(self, name: str) -> _Job:
        found = self._jobs.get(name)
        if found is None:
            raise CommandError("DeviceNotActive", f"there is no job {printable(name)}")
        return found


def _has_ended(job: _Job) -> bool:
    return job.mirror.status is MirrorStatus.CONCLUDED


def _told(name: str, mirror: Mirror) -> Object:
    told: Object = {
        "id": name,
        "type": "mirror",
        "status": str(mirror.status),
        "current-progress": mirror.done,
        "total-progress": mirror.total,
    }
    return told | ({"error": str(mirror.error)} if mirror.error is not None else {})


def _uri(server: Object, export: str) -> str:
    """The NBD URI of QEMU's ``SocketAddress`` *server*."""
    try:
        name = quote(export)
    except UnicodeError as error:
        raise UsageError(f"expected the name of an export, found {printable(export)}") from error
    match server:
        case {"type": "unix", "path": str(path), **rest} if not rest and path.isprintable():
            return f"nbd+unix:///{name}?socket={quote(path)}"
        case {"type": "inet", "host": str(host), "port": str(port), **rest} if not rest:
            where = f"[{host}]" if ":" in host else host
            return f"nbd://{where}:{port}/{name}"
    raise UsageError("expected a server of type unix with a path, or inet with host and port")
