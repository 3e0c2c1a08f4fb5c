"""The connections of one incoming migration: telling them apart, keeping them in step, ending them.

The main channel starts with the stream's magic, a multifd channel with its own (QEMU 8.0 decides in
the same way; 7.2 relies on the order of connections).  Each connection has a thread of its own from
the first byte on, so none that is silent or slow holds up what another one says.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vmferry.errors import (
    ChannelClosed,
    LimitExceeded,
    PeerError,
    PeerSilent,
    StreamError,
    TransportError,
    printable,
)
from vmferry.transports import Channel, Listener
from vmferry.units import format_duration
from vmferry.wire import layout as stream
from vmferry.wire.multifd import MAGIC, Method, MultifdReader
from vmferry.wire.ram import RamBlock, RamPages

from .barrier import SyncBarrier
from .channels import PageChannel, Place

_PREEMPT_SILENCE: Final = 1.0
"""Seconds after which a connection that says nothing is taken for a preempt channel, which says
nothing while the source is in precopy."""

_LOOK: Final = 0.02
"""Seconds between two looks for connections while one has not yet said what it is."""

_MOST: Final = 257
"""Connections of one migration: 255 multifd channels, the main channel and a preempt channel."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a peer may stay silent, in seconds; ``None`` is for ever.

    ``connect`` for the first connection.  ``first`` from a connection to its first four bytes, and
    from the first connection to the main channel's.  ``idle`` between two reads after that: longer
    than a QEMU, which is silent there, may sit at ``pre-switchover``.  It also bounds how long an
    answer to the source may stand still, and the wait for a multifd channel while none of them says
    anything.
    """

    connect: float | None = None
    first: float | None = 30.0
    idle: float | None = 60.0


class Connections:
    """Everything that the source has connected.

    The first failure of any channel but the main one is kept in :attr:`failure` and breaks all the
    others.  *store* takes the pages of multifd channels, except those that were
    received into the memory that *place* lends; *refuse* tells the source of a failure and
    ends the main channel soon, *received* is told how many bytes came through a multifd channel.

    A connection that is none of a source is dropped, and *dropped* is told why, as long as no main
    channel has come; also later where it is older, as the main channel is the first one that a
    source opens.  Without *dropped* the first connection decides, as with a QEMU.  *one_by_one*:
    none is let in while it is not known what the one before is, for one that says nothing may be
    the preempt channel, which is not this side's to read.
    """

    def __init__(
        self,
        listener: Listener,
        deadlines: Deadlines,
        store: Callable[[RamPages], None],
        refuse: Callable[[BaseException], None],
        received: Callable[[int], None],
        dropped: Callable[[Exception], None] | None = None,
        place: Place | None = None,
        one_by_one: bool = False,
    ) -> None:
        self._one_by_one = one_by_one
        self._listener = listener
        self._deadlines = deadlines
        self._store = store
        self._place = place
        self._refuse = refuse
        self._received = received
        self._dropped = None if listener.single else dropped
        self._barrier = SyncBarrier()
        self._blocks: dict[str, RamBlock] = {}
        self._page_size = 0
        self._ram_known = threading.Event()
        # Guards what is below, and tells of its changes.
        self._changed = threading.Condition()
        self._channels: list[Channel] = []
        self._threads: list[threading.Thread] = []
        self._unknown: set[Channel] = set()
        self._may_preempt = False
        self._preempt: set[Channel] = set()
        self._main: tuple[Channel, bytes] | None = None
        self._pages: list[PageChannel] = []
        self._expected = 0
        self._settled = False
        self.failure: BaseException | None = None

    @property
    def address(self) -> str:
        """The URI for a source on this machine to connect to."""
        return self._listener.address

    @property
    def multifd(self) -> bool:
        """Whether there are multifd channels."""
        return bool(self._pages)

    @property
    def methods(self) -> frozenset[Method]:
        """How the multifd channels compress; empty without multifd."""
        return frozenset(channel.method for channel in self._pages)

    def accept_main(self) -> tuple[Channel, bytes]:
        """Wait for the main channel; returns it and the bytes read from it already."""
        began = time.monotonic()
        patience = left = self._deadlines.connect
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self.failure or self._main or not self._unknown, _LOOK
                )
                all_known = not self._unknown
            self.check()
            if self._main is not None:
                return self._main
            more = all_known or (not self._one_by_one and self._listener.pending())
            if len(self._channels) < _MOST and more:
                self._accept(self._deadlines.first if self._pages else left)
                if patience is not None:
                    left = max(began + patience - time.monotonic(), 0.0)

    def announce_ram(self, blocks: dict[str, RamBlock], page_size: int) -> None:
        """Guest memory is known: channels may read packets."""
        self._blocks.update(blocks)
        self._page_size = page_size
        self._ram_known.set()

    def expect(self, channels: int) -> None:
        """So many multifd channels will come, or have: a proxy may hold some of them up."""
        if not 1 <= channels <= _MOST - 2:
            raise PeerError(f"expected 1 to {_MOST - 2} multifd channels, found {channels}")
        self._expected = channels

    def allow_preempt(self) -> None:
        """The source may switch to postcopy: one connection may be its preempt channel."""
        self._may_preempt = True

    def accept_preempt(self, *, wait: bool) -> Channel | None:
        """The preempt channel, the connection behind the main one; where *wait*, it has to come."""
        if not wait and not self._listener.pending():
            return None
        channel = self._listener.accept(self._deadlines.first)
        if channel is not None:
            self._channels.append(channel)
        return channel

    def synchronise(self) -> None:
        """The main channel is at a synchronisation: wait until every channel has caught up."""
        if self._one_by_one and self._may_preempt:
            if self.multifd:
                raise PeerError("the source has postcopy-ram on with multifd: turn that off there")
            return
        # All channels have connected before the source writes its first synchronisation.
        self._accept_pending()
        self._learn()
        if len(self._pages) < self._expected:
            self._await_expected()
        self._barrier.main(self._deadlines.idle)
        self.check()

    def admit(self) -> None:
        """Let in who has connected meanwhile; to be called now and then.

        Behind a proxy a multifd channel may come later than what the main channel says, and its
        source waits for it to be read.
        """
        if self._ram_known.is_set() and not (self._one_by_one and self._may_preempt):
            self._accept_pending()

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            raise self.failure

    def settle(self) -> None:
        """Everything has come: a failure until now counts, raised here, and no later one does."""
        self._barrier.finish()
        with self._changed:
            self.check()
            self._settled = True

    def cancel(self) -> None:
        """Break everything off, from any thread; without effect once settled."""
        self._fail(ChannelClosed("the migration was cancelled on this side"))

    def close(self) -> None:
        """End everything, and wait for the threads."""
        with self._changed:
            self._settled = True
        self._barrier.break_off()
        self._ram_known.set()
        for channel in self._channels:
            channel.shutdown()
        for thread in self._threads:
            thread.join()
        for channel in self._channels:
            channel.close()
        self._pages.clear()

    def _await_expected(self) -> None:
        patience = self._deadlines.first
        deadline = math.inf if patience is None else time.monotonic() + patience
        while len(self._pages) < self._expected:
            self.check()
            if self._listener.pending():
                self._accept(0)
                self._learn()
            elif time.monotonic() < deadline:
                time.sleep(_LOOK)
            else:
                waited = format_duration(patience or 0.0)
                raise PeerSilent(
                    f"waited {waited} for {self._expected} multifd channels,"
                    f" {len(self._pages)} came"
                )

    def _accept_pending(self) -> None:
        while self._listener.pending():
            if self._barrier.released > 1:
                raise PeerError("a connection came after multifd had begun, too late to take part")
            self._accept(0)

    def _accept(self, timeout: float | None) -> None:
        channel = self._listener.accept(timeout)
        if channel is None:
            raise TransportError(f"{self._listener.address}: there will be no main channel")
        with self._changed:
            # Either this sees a failure, or whoever failed sees the channel.
            self._channels.append(channel)
            self.check()
            if len(self._channels) > _MOST:
                raise LimitExceeded(f"at most {_MOST} connections", "more")
            self._unknown.add(channel)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=self._serve, args=(channel,), name="peer", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _learn(self) -> None:
        """Wait until every connection has said what it is; each has a deadline for that."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or not self._unknown,
                _PREEMPT_SILENCE if self._may_preempt else None,
            )
            self.check()
            self._preempt |= self._unknown
            self._unknown.clear()
            if len(self._preempt) > 1:
                raise PeerError("expected one preempt channel and multifd channels, found others")

    # In the thread of a connection

    def _serve(self, channel: Channel) -> None:
        try:
            head = read_magic(channel, self._deadlines.first)
            pages = self._identify(channel, head)
        except Exception as error:  # noqa: BLE001 - handed to the thread that reports it
            if not self._drop(channel, error) and channel not in self._preempt:
                self._fail(error)
            return
        try:
            if pages is not None:
                pages.run()
        except Exception as error:  # noqa: BLE001 - as above
            if channel not in self._preempt:
                self._fail(error)

    def _drop(self, channel: Channel, error: Exception) -> bool:
        """Close a connection that is none of the source, where that can be known."""
        with self._changed:
            if self._dropped is None or self.failure is not None or self._settled:
                return False
            order = self._channels.index
            if self._main is not None and order(channel) > order(self._main[0]):
                return False
            self._channels.remove(channel)
            self._unknown.discard(channel)
            self._changed.notify_all()
        channel.close()
        self._dropped(error)
        return True

    def _identify(self, channel: Channel, head: bytes) -> PageChannel | None:
        """What a connection is by its first bytes: its reader, if it is a multifd channel."""
        with self._changed:
            self._unknown.discard(channel)
            self._changed.notify_all()
            if channel in self._preempt:
                return None
            if head == MAGIC:
                return self._add_pages(channel, head)
            is_first = self._main is None
            if is_first and (self._dropped is None or head == stream.MAGIC):
                # What is no stream at all is refused by the reader, in its own words.
                self._main = channel, head
                return None
            if self._may_preempt and head:
                # Pages of postcopy: that it has begun is for the main channel to say.
                self._preempt.add(channel)
                return None
        expected = f"a multifd channel with magic {MAGIC.hex()}"
        if is_first:
            expected = f"a migration stream with magic {stream.MAGIC.hex()}"
        raise StreamError(expected, head.hex() or "its end", channel=channel.name, offset=0)

    def _add_pages(self, channel: Channel, head: bytes) -> PageChannel:
        self._barrier.expect()
        reader = MultifdReader(self._blocks, bypass=True)
        pages = PageChannel(
            channel,
            head,
            reader,
            self._barrier,
            prepare=self._prepare,
            store=self._store,
            place=self._place,
            received=self._heard,
        )
        self._pages.append(pages)
        return pages

    def _prepare(self, reader: MultifdReader) -> None:
        self._ram_known.wait()
        if not self._page_size:
            raise ChannelClosed("the migration ended before guest memory was known")
        reader.page_size = self._page_size

    def _heard(self, count: int) -> None:
        self._barrier.heard()
        self._received(count)

    def _fail(self, error: BaseException) -> None:
        """Something failed: tell the source, and wake whoever waits for a channel."""
        with self._changed:
            if self.failure is not None or self._settled:
                return
            self.failure = error
            self._changed.notify_all()
            main = self._main[0] if self._main else None
            others = [channel for channel in self._channels if channel is not main]
        self._barrier.break_off()
        self._ram_known.set()
        for channel in others:
            channel.shutdown()
        if main is None:
            self._listener.shutdown()
        self._refuse(error)


def read_magic(channel: Channel, timeout: float | None) -> bytes:
    """The first four bytes of a connection, or fewer where it was closed before.

    Waits at most *timeout* seconds for all of them.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    head = bytearray(4)
    have = 0
    while have < 4:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            patience = format_duration(timeout or 0.0)
            raise TransportError(f"{printable(channel.name)}: {have} bytes in {patience}, not 4")
        count = channel.recv_into(memoryview(head)[have:], left)
        if count == 0:
            break
        have += count
    return bytes(head[:have])
