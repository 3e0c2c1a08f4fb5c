"""Running a saved machine at once, in a QEMU that was never changed: its memory follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vmferry.errors import CheckpointDamaged, UsageError
from vmferry.migration.postcopy.server import Service
from vmferry.migration.postcopy.source import LazyOptions, LazySource, Paused, quantiles
from vmferry.migration.progress import Meter, Report
from vmferry.migration.run_state import RUNNING
from vmferry.pages import page_sums
from vmferry.qemu.postcopy import postcopy
from vmferry.qemu.qmp import Qmp
from vmferry.qemu.waiting import WaitingQemu, has_everything, listen_again
from vmferry.transports import connect
from vmferry.wire.ram import RamBlock

from . import working_set
from .checkpoint import Checkpoint
from .stored import StoredPages

_PATIENCE: Final = 30.0
"""Seconds that QMP may take to tell that the machine runs."""

_AGAIN: Final = 0.5
"""Seconds before a restore that was broken off is taken up again."""

_MOMENTS: Final = (10, 100, 1000)
"""Milliseconds."""

_BUCKETS: Final = (10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)
"""Bounds of the histogram of service times, in microseconds."""


@dataclass(frozen=True, slots=True)
class Restored:
    """How a restore went; seconds since the connection.

    ``running`` is when the machine ran, by QMP's event, or without QMP when its devices were
    loaded; ``None`` where it is paused.  ``took`` has the seconds from when a request was read to
    when its page was written, ``late`` counts requests for pages that were under way already.
    """

    running: float | None
    loaded: float
    total: float
    requests: int
    late: int
    pages: int
    took: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dumps``; times in milliseconds and microseconds, as named."""
        micro = np.asarray(self.took) * 1e6
        median, most = quantiles(self.took)
        edges = np.array([0, *_BUCKETS, np.inf])
        counts = np.histogram(micro, edges)[0].tolist()
        return {
            "time_to_running_ms": None if self.running is None else round(self.running * 1e3, 2),
            "time_to_loaded_ms": round(self.loaded * 1e3, 2),
            "requests": self.requests,
            "late_requests": self.late,
            "pages_sent": self.pages,
            "fault_service_us": {
                "median": round(median * 1e6, 1),
                "p99": round(most * 1e6, 1),
                "histogram": [
                    [bound, count] for bound, count in zip([*_BUCKETS, None], counts, strict=True)
                ],
            },
            "total_ms": round(self.total * 1e3, 1),
        }


class Restore:
    """One restore of *checkpoint* into what waits at *uri*; :meth:`run` it once.

    *qmp* is a session with the QEMU that waits: then it is made to listen, and the checkpoint is
    held against it first.  With ``options.resume`` its migration is paused and goes on.  *verify*
    holds each page against its checksum before it is sent.  *learn*: push what was wanted first in
    earlier restores, and note what is wanted in this one.  *paused* hears of a connection that was
    lost, or a page that could not be read, while the machine runs: with *qmp* it is taken up again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        uri: str,
        *,
        qmp: Qmp | None = None,
        options: LazyOptions | None = None,
        progress: Report | None = None,
        verify: bool = False,
        learn: bool = True,
        paused: Callable[[Paused], None] = lambda _: None,
    ) -> None:
        self._checkpoint = checkpoint
        self._uri = uri
        self._qmp = qmp
        self._options = options or LazyOptions()
        self._meter = Meter(progress)
        self._machine = _Verified(checkpoint) if verify else checkpoint
        self._learn = learn and not self._options.resume
        self._paused = paused
        self._source: LazySource | None = None
        self._done = False
        self._cancelled = threading.Event()

    @property
    def is_needed(self) -> bool:
        """Whether a machine runs that lacks memory."""
        source = self._source
        return source is not None and source.service.loaded is not None and not self._done

    def cancel(self) -> bool:
        """Give up, from any thread."""
        self._cancelled.set()
        if self._source is not None:
            self._source.cancel()
        return True

    def run(self) -> Restored:
        """Serve until the machine has all of its memory.

        Raises :class:`~vmferry.migration.postcopy.source.Paused` where the connection is lost while
        the machine runs, :class:`~vmferry.errors.Refused` where another machine waits, and what
        :func:`~vmferry.checkpoint.transfer.send` raises.
        """
        waiting = self._prepare()
        known = _known(self._checkpoint)
        first, held = known.split() if self._learn else ([], set())
        source = self._begin(self._options, Service())
        per_unit = [block.unit // self._checkpoint.page_size for block in source.blocks]
        source.expect(working_set.units_of(first, per_unit))
        began = time.time()
        try:
            self._serve(source)
        finally:
            self._done = True
            if self._learn and source.service.loaded is not None:
                found = iter(source.service.asked)
                moments = zip(found, found, source.service.asked_at, strict=True)
                asked = [(n, unit * per_unit[n], when) for n, unit, when in moments]
                working_set.write(self._checkpoint.path, known.after(asked, held))
        return self._restored(source.service, time.time() - began, began, waiting)

    def _begin(self, options: LazyOptions, service: Service) -> LazySource:
        source = self._source = LazySource(
            self._machine,
            lambda given_up: connect(self._uri, given_up=given_up),
            options=options,
            meter=self._meter,
            service=service,
        )
        if self._cancelled.is_set():
            source.cancel()
        return source

    def _serve(self, source: LazySource) -> None:
        told = ""
        while True:
            try:
                return source.run()
            except Paused as error:
                if self._qmp is None:
                    raise
                if told != (told := str(error)):  # what stays as it is, is found each time
                    self._paused(error)
                last = error
            following = self._taken_up(self._qmp, source, last)
            if following is None:
                return None
            source = following

    def _taken_up(self, qmp: Qmp, source: LazySource, error: Paused) -> LazySource | None:
        """A source that goes on, once the destination listens again; none where it has all."""
        while not self._cancelled.wait(_AGAIN):
            if has_everything(qmp):
                return None  # it had said so, and that was lost
            try:
                listen_again(qmp, self._uri)
                return self._begin(replace(self._options, resume=True), source.service)
            except UsageError:
                continue  # it has not noticed yet
        raise error

    def _restored(
        self, service: Service, total: float, began: float, waiting: WaitingQemu | None
    ) -> Restored:
        running = service.loaded
        if waiting is not None:
            paused = is_paused(self._checkpoint)
            running = None if paused else waiting.running_at(_PATIENCE) - began
        return Restored(
            running,
            service.loaded or 0.0,
            total,
            service.requests,
            service.late,
            service.pages,
            service.took,
        )

    def _prepare(self) -> WaitingQemu | None:
        if self._qmp is None:
            return None
        if self._options.resume:
            listen_again(self._qmp, self._uri)
            return None
        waiting = WaitingQemu(self._qmp)
        configuration = self._checkpoint.configuration
        machine = None if configuration is None else configuration.machine
        sizes = waiting.check(self._checkpoint.blocks, machine)
        stated = {**sizes, **self._options.page_sizes}
        self._options = replace(self._options, page_sizes=stated)
        paused = is_paused(self._checkpoint)
        waiting.listen(self._uri, postcopy(preempt=self._options.preempt), paused=paused)
        return waiting


def survey_working_set(checkpoint: Checkpoint) -> dict[str, Any]:
    """What is known of the pages that the machine wants first, as plain data.

    ``within_ms`` has pairs of milliseconds since the connection and how many pages had been wanted
    by then; ``coverage`` is the share of what was wanted at the last restore that had been sent
    before it was asked for; ``None`` before there were two.
    """
    known = _known(checkpoint)
    size = checkpoint.page_size
    counts = np.bincount(known.entries["block"], minlength=len(checkpoint.blocks)).tolist()
    total = sum(block.length for block in checkpoint.blocks)
    return {
        "pages": len(known.entries),
        "bytes": len(known.entries) * size,
        "share": len(known.entries) * size / total if total else 0.0,
        "restores": known.restores,
        "within_ms": [
            [bound, int(np.count_nonzero(known.entries["when"] <= bound * 1000))]
            for bound in _MOMENTS
        ],
        "coverage": known.coverage,
        "blocks": {
            block.name: count
            for block, count in zip(checkpoint.blocks, counts, strict=True)
            if count
        },
    }


def _known(checkpoint: Checkpoint) -> working_set.WorkingSet:
    pages = [block.length // checkpoint.page_size for block in checkpoint.blocks]
    return working_set.read(checkpoint.path, pages)


def is_paused(checkpoint: Checkpoint) -> bool:
    """Whether the machine stood still when it was saved (section ``globalstate``)."""
    for section in checkpoint.device_sections:
        if section.name == "globalstate":
            state = bytes(section.body)[4:].split(b"\0", 1)[0]
            return state != RUNNING.encode()
    return False


class _Verified:
    """A checkpoint whose pages are held against their checksums as they are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def memory(self, block: RamBlock) -> _VerifiedPages | None:
        """The content of a block."""
        pages = self._checkpoint.memory(block)
        return None if pages is None else _VerifiedPages(pages)


class _VerifiedPages:
    def __init__(self, pages: StoredPages) -> None:
        self._pages = pages
        self.sums = pages.sums

    def data_from(self, offset: int) -> tuple[int, int] | None:
        """As :meth:`StoredPages.data_from`; a hole is as wrong as other zeros are."""
        found = self._pages.data_from(offset)
        size = self._pages.page_size
        first, end = offset // size, (self._pages.size if found is None else found[0]) // size
        self._refuse(first, self.sums[first:end] != 0)
        return found

    def read(self, offset: int, *buffers: memoryview) -> None:
        """As :meth:`StoredPages.read`; raises :class:`CheckpointDamaged` for a wrong page."""
        self._pages.read(offset, *buffers)
        size = self._pages.page_size
        for buffer in buffers:
            first, count = offset // size, len(buffer) // size
            found = np.zeros(count, np.uint64)
            page_sums(buffer, size, found)
            self._refuse(first, found != self.sums[first : first + count])
            offset += len(buffer)

    def _refuse(self, first: int, is_wrong: npt.NDArray[np.bool_]) -> None:
        """Raise where one of the pages from *first* on is wrong."""
        wrong = np.flatnonzero(is_wrong)
        if len(wrong):
            at = (first + int(wrong[0])) * self._pages.page_size
            raise CheckpointDamaged(
                f"{self._pages.path}: the page at {at:#x} is damaged: its content does not match"
                " its sum"
            )
