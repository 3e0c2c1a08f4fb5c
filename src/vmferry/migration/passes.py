"""What is sent of guest memory and disks: a source asks for one section after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

from .batches import Batch, BatchWriter
from .disks import Record, all_of
from .outgoing import Outgoing
from .page_sender import PageSender
from .progress import Meter


class Passes(Protocol):
    """Guest memory and disks, as a source sends them.

    Pages that go over multifd are handed to *pages* (``None`` without multifd); what is yielded
    goes over the main channel.  A batch is right until the next one is asked for.
    """

    @property
    def switches(self) -> bool:
        """Behind the last of :meth:`parts`: whether the rest follows the machine, by postcopy."""

    def start(self) -> bool:
        """All channels are there; whether there are disks that move along."""

    def begin(self, write: Callable[[bytes], object]) -> None:
        """Begin the other sections; *write* takes them whole."""

    def chunks(self) -> Iterator[Record]:
        """What is to be sent of disks now; a chunk is right until the next one is asked for."""

    def parts(self, pages: PageSender | None) -> Iterator[Iterator[Batch]]:
        """One section after the other, while the machine may still run."""

    def stop(self) -> None:
        """Stop the machine: what is asked for from now on is the last."""

    def rest(self, pages: PageSender | None) -> Iterator[Batch]:
        """The last section; the disks are not needed any more."""

    def end(self) -> None:
        """The last of guest memory is sent: write the last of the other sections."""

    def done(self) -> None:
        """The destination has the machine."""


class OnePass:
    """The memory and the disks of a machine at rest, all of it once."""

    switches = False

    def __init__(self, machine: Outgoing, meter: Meter, cleanup: ExitStack) -> None:
        self._machine = machine
        self._meter = meter
        self._batches = cleanup.enter_context(BatchWriter(machine.page_size))
        self._chunks = all_of(machine.disks)

    def start(self) -> bool:
        """Whether any disk was saved."""
        return bool(self._machine.disks)

    def begin(self, write: Callable[[bytes], object]) -> None:
        """Nothing: there are no other sections."""

    def chunks(self) -> Iterator[Record]:
        """Everything, and then nothing."""
        return self._chunks

    def stop(self) -> None:
        """Nothing: it does not run."""

    def end(self) -> None:
        """Nothing."""

    def parts(self, pages: PageSender | None) -> Iterator[Iterator[Batch]]:
        """Everything in one section."""
        self._meter.next_round()
        yield self._all(pages)

    def rest(self, pages: PageSender | None) -> Iterator[Batch]:  # noqa: ARG002 - nothing is left
        """Nothing."""
        return iter(())

    def done(self) -> None:
        """Nothing."""

    def _all(self, pages: PageSender | None) -> Iterator[Batch]:
        for block in self._machine.blocks:
            store = self._machine.memory(block)
            if store is None:
                continue
            if pages is not None:
                pages.send_block(block, store)
            yield from self._batches.batches(block, store, zero_only=pages is not None)
