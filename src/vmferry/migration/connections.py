"""The connections of one incoming migration: telling them apart, keeping them in step, ending them.

The main channel starts with the stream's magic, a multifd channel with its own (QEMU 8.0 decides in
the same way; 7.2 relies on the order of connections).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from vmferry.errors import ChannelClosed, PeerError, StreamError, TransportError
from vmferry.transports import Channel, Listener
from vmferry.wire.multifd import MAGIC, Method, MultifdReader
from vmferry.wire.ram import RamBlock, RamPages

from .barrier import SyncBarrier
from .channels import PageChannel

_PREEMPT_SILENCE = 1.0
"""Seconds after which a connection that says nothing is taken for a preempt channel, which says
nothing while the source is in precopy."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a peer may stay silent, in seconds; ``None`` is for ever.

    ``connect`` for the first connection, ``first`` for the first bytes of a connection, ``idle``
    between two reads after that: longer than the source may sit at ``pre-switchover``.
    """

    connect: float | None = None
    first: float | None = 30.0
    idle: float | None = 60.0


class Connections:
    """Everything that the source has connected.

    The first failure of any channel is kept in :attr:`failure` and breaks all the others.  *store*
    takes the pages of multifd channels, *refuse* tells the source of a failure, *received* is told
    how many bytes came through a multifd channel.
    """

    def __init__(
        self,
        listener: Listener,
        deadlines: Deadlines,
        store: Callable[[RamPages], None],
        refuse: Callable[[], None],
        received: Callable[[int], None],
    ) -> None:
        self._listener = listener
        self._deadlines = deadlines
        self._store = store
        self._refuse = refuse
        self._received = received
        self._main: Channel | None = None
        self._pages: list[PageChannel] = []
        self._aside: list[Channel] = []
        self._barrier = SyncBarrier()
        self._blocks: dict[str, RamBlock] = {}
        self._page_size = 0
        self._ram_known = threading.Event()
        self._lock = threading.Lock()
        self._settled = False
        self.failure: BaseException | None = None

    @property
    def address(self) -> str:
        """The URI for a source on this machine to connect to."""
        return self._listener.address

    @property
    def methods(self) -> frozenset[Method]:
        """How the multifd channels compress; empty without multifd."""
        return frozenset(channel.method for channel in self._pages)

    def accept_main(self) -> tuple[Channel, bytes]:
        """Wait for the main channel; returns it and the bytes read from it already."""
        while True:
            channel = self._listener.accept(self._deadlines.connect)
            if channel is None:
                raise TransportError(f"{self._listener.address}: there will be no main channel")
            self._keep(channel)
            head = read_magic(channel, self._deadlines.first)
            if head != MAGIC:
                # What is no stream at all is refused by the reader, in its own words.
                self._main = channel
                return channel, head
            self._add_pages(channel, head)

    def announce_ram(self, blocks: dict[str, RamBlock], page_size: int) -> None:
        """Guest memory is known: channels may read packets."""
        self._blocks.update(blocks)
        self._page_size = page_size
        self._ram_known.set()

    def synchronise(self, *, preempt: bool) -> None:
        """The main channel is at a synchronisation: wait until every channel has caught up.

        *preempt* says that a connection which stays silent may be a postcopy preempt channel.
        """
        # All channels have connected before the source writes its first synchronisation.
        while self._listener.pending():
            channel = self._listener.accept(0)
            if channel is None:
                break
            if self._barrier.released > 1:
                channel.close()
                raise PeerError("a connection came after multifd had begun, too late to take part")
            self._adopt(channel, preempt=preempt)
        self._barrier.main(self._deadlines.idle)
        if self.failure is not None:
            raise self.failure

    def _keep(self, channel: Channel) -> None:
        """Remember a channel; either this sees a failure, or whoever failed sees the channel."""
        self._aside.append(channel)
        if self.failure is not None:
            raise self.failure

    def _adopt(self, channel: Channel, *, preempt: bool) -> None:
        self._keep(channel)
        try:
            head = read_magic(channel, _PREEMPT_SILENCE if preempt else self._deadlines.first)
        except TransportError:
            if preempt:
                return
            raise
        if head != MAGIC:
            expected = f"a multifd channel with magic {MAGIC.hex()}"
            raise StreamError(expected, head.hex() or "its end", channel=channel.name, offset=0)
        self._add_pages(channel, head)

    def _add_pages(self, channel: Channel, head: bytes) -> None:
        self._barrier.expect()
        reader = MultifdReader(self._blocks)
        self._pages.append(
            PageChannel(
                channel,
                head,
                reader,
                self._barrier,
                self._prepare,
                self._store,
                self._fail,
                self._received,
            )
        )

    def _prepare(self, reader: MultifdReader) -> None:
        self._ram_known.wait()
        reader.page_size = self._page_size

    def settle(self) -> None:
        """Everything has come: a failure until now counts, raised here, and no later one does."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            self._settled = True

    def cancel(self) -> None:
        """Break everything off, from any thread; without effect once settled."""
        self._fail(ChannelClosed("the migration was cancelled on this side"))
        if not self._settled:
            self._listener.shutdown()

    def _fail(self, error: BaseException) -> None:
        """Something failed: tell the source, and wake whoever waits for a channel."""
        with self._lock:
            if self.failure is not None or self._settled:
                return
            self.failure = error
        self._barrier.break_off()
        self._refuse()
        for channel in list(self._aside):
            channel.shutdown()

    def close(self) -> None:
        """End everything, and wait for the threads."""
        self._barrier.break_off()
        self._ram_known.set()
        for pages in self._pages:
            pages.stop()
        for channel in self._aside:
            channel.close()


def read_magic(channel: Channel, timeout: float | None) -> bytes:
    """The first four bytes of a connection, or fewer where it was closed before."""
    head = bytearray(4)
    have = 0
    while have < 4:
        count = channel.recv_into(memoryview(head)[have:], timeout)
        if count == 0:
            break
        have += count
    return bytes(head[:have])
