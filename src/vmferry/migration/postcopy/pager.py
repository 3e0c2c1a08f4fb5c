"""The pager: the process that fetches the memory of a machine that runs already.

It is a process of its own because a thread that touches a missing page may hold the interpreter
lock of its process: a handler there would wait for itself.  Nothing of the machine's process is
needed for a page to come.  The pager has the descriptor of the faults, the connections to the
source, and what was read from them already, all by descriptor; it alone reads and writes these
connections until the end.

Both sides talk over a socket in messages of JSON, with descriptors beside them::

    memory  blocks, threads faults, marks          the memory, and the threads of which it is
                                                   counted how long they wait; pages come from
                                                   here on
    stream  start, words... main, head             a connection, and what was read of it; in a
                                                   recovery "source": the pings that it begins with
    urgent                  preempt                the preempt channel that belongs to it
    keep                                           a loss of the source is a pause from now on
    say     data                                   send it to the source
    flush                                          tell when all of that is on its way

    up                                             it has started
    kept                    faults                 the answer to "keep"
    said                                           the answer to "flush", unless it is lost before
    word    value                                  a ping with a value of "words", once each
    resumed                                        the source goes on, after a recovery
    paused  reason                                 the source is lost, and can come back
    failed  reason                                 the source is lost before "keep": all is given up
    done    pages, requests                        everything has come; the source waits for a word

Until "keep" only the pager has the descriptor of the faults: if it dies, nobody waits any more, and
the machine, whose memory is not whole then, has never run.  From "keep" on the machine's process
has it as well, so that whoever waits for a page goes on waiting, whatever becomes of the pager.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Final

from vmferry.errors import PeerError, PeerSilent, TransportError, TruncatedStream, VmferryError
from vmferry.memory import PAGE_SIZE
from vmferry.units import format_duration
from vmferry.wire.buffer import ChannelReader
from vmferry.wire.commands import Ping, PostcopyResume, ReceivedBitmap
from vmferry.wire.postcopy import Continuation, PostcopyReader, UrgentReader
from vmferry.wire.ram import RamBlock, RamPages
from vmferry.wire.return_path import HavePages, Message, Pong, RequestPages, ResumeAck

from .missing import MappedBlock, MissingMemory
from .shared import Shared
from .waits import Waits

MESSAGE: Final = 1 << 20
"""Bytes of a message between both sides, at most."""

_READ: Final = 256 << 10
"""Bytes that are read in one go: a fault may wait as long as it takes to place them."""

_UNSENT: Final = 1 << 20
"""Bytes that may wait until the source takes them, beside the bitmaps that it asks for: more than
there are threads to miss a page."""

_FAREWELL: Final = 5.0
"""Seconds that the source has to take the last word."""


class Link:
    """A connection to the source, and the reader of what it says."""

    def __init__(self, sock: socket.socket, reader: ChannelReader[Any]) -> None:
        self.sock = sock
        self.reader = reader

    def receive(self) -> bool:
        """Take what is there; whether there was anything, be it the end."""
        buffer = self.reader.buffer
        try:
            room = buffer.room()[:_READ]
            buffer.received(self.sock.recv_into(room, 0, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError as error:
            raise TransportError(f"the connection to the source broke: {error.strerror}") from error
        return True


class Pager:
    """Serves the process at the other end of *control* until that closes it."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._faults = -1
        self._memory: MissingMemory | None = None
        self._main: Link | None = None
        self._urgent: Link | None = None
        self._start: Continuation | None = None
        self._words: list[int] = []
        self._source: list[int] = []
        self._idle: float | None = None
        self._heard = 0.0
        self._unsent = bytearray()
        self._bitmaps = 0
        self._last_asked: str | None = None
        self._asks = False
        self._owes_word = False
        self._keeps = False
        self._is_done = False

    def run(self) -> None:
        """Work until the other side is done."""
        self._tell("up")
        while True:
            ready = {number for number, _ in self._poll.poll(self._patience())}
            if self._control.fileno() in ready and not self._obey():
                return self._leave()
            try:
                if self._faults in ready:
                    self._ask()
                self._turn(ready)
            except VmferryError as error:
                self._lose(str(error))
            except OSError as error:
                self._lose(f"the host does not take a page: {error.strerror}")

    @property
    def _waits(self) -> bool:
        """Whether the source has something to say: a page, or that it goes on."""
        memory = self._memory
        if memory is None or self._main is None or self._is_done:
            return False
        return bool(memory.waited) or not self._asks

    def _patience(self) -> float | None:
        """Milliseconds: the source may be silent where nobody waits for it."""
        return None if self._idle is None or not self._waits else 1000.0

    def _turn(self, ready: set[int]) -> None:
        for link in (self._urgent, self._main):
            if link is not None and link.sock.fileno() in ready and link.receive():
                if self._asks:  # whoever comes back has as long as that in all
                    self._heard = time.monotonic()
                self._take(link)
        if self._unsent and self._main is not None:
            self._flush()
        self._check_end()
        if self._waits and self._idle and time.monotonic() - self._heard > self._idle:
            patience = format_duration(self._idle)
            what = "a page" if self._asks else "the word that it goes on"
            raise PeerSilent(f"waited {patience} for {what} of the source, which does not come")

    # Faults

    def _ask(self) -> None:
        memory = self._memory
        if memory is None:
            return
        if not memory.waited:
            self._heard = time.monotonic()
        wanted = memory.faults()
        if self._asks:  # else it is asked for when the source is back
            self._request(wanted)

    def _request(self, pages: Iterable[tuple[str, int]]) -> None:
        for block, page in pages:
            named = None if block == self._last_asked else block
            self._last_asked = block
            self._say(RequestPages(page * PAGE_SIZE, PAGE_SIZE, named))

    def _say(self, message: Message) -> None:
        self._send(message.encode())

    def _send(self, data: bytes) -> None:
        if self._main is None:
            return
        self._unsent += data
        self._flush()
        if len(self._unsent) > _UNSENT + self._bitmaps:
            raise PeerError("the source does not read what it is asked and told")

    def _flush(self) -> None:
        """Send what the connection takes; the rest when it takes more."""
        link = self._main
        if link is None:
            return
        try:
            flags = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
            del self._unsent[: link.sock.send(self._unsent, flags)]
        except BlockingIOError:
            pass
        except OSError:
            self._unsent.clear()  # reading, which meets what came before, tells why
            self._owes_word = False
        if self._owes_word and not self._unsent:
            self._owes_word = False
            self._tell("said")
        if not link.reader.finished:
            wanted = select.POLLIN | (select.POLLOUT if self._unsent else 0)
            self._poll.modify(link.sock, wanted)

    # The stream

    def _take(self, link: Link) -> None:
        try:
            for event in link.reader.events():
                self._handle(event)
        except TruncatedStream:
            raise _cut_off() from None
        if link.reader.finished:
            self._poll.unregister(link.sock)
            if link is self._main and link.reader.buffer:
                raise PeerError("expected nothing behind the end of the stream, found more")
        elif link.reader.buffer.ended:
            raise _cut_off()

    def _handle(self, event: Any) -> None:
        memory = self._memory
        match event:
            case RamPages() if memory is not None:
                memory.place(event)
            case Ping(value) if value in self._words:
                self._words.remove(value)
                self._tell("word", value=value)
            case Ping(value) if self._source[:1] == [value]:
                del self._source[0]
            case Ping(value):
                self._say(Pong(value))
            case ReceivedBitmap(block) if memory is not None:
                have = memory.have(block)
                if have is None:
                    raise PeerError(f"the source asks for a block {block!r}, which is not there")
                self._say(HavePages(block, have))
            case PostcopyResume() if memory is not None:
                if self._source:
                    raise PeerError("another source than that of the machine wants to go on")
                self._last_asked, self._asks = None, True
                if self._urgent is not None:
                    self._poll.register(self._urgent.sock, select.POLLIN)
                self._say(ResumeAck())
                self._request(memory.again())
                self._heard = time.monotonic()
                self._tell("resumed")

    def _check_end(self) -> None:
        """The end: what is still missing is zero.

        What the preempt channel has was asked for, so it may be behind the end of the main one.
        """
        memory, main, urgent = self._memory, self._main, self._urgent
        if memory is None or main is None or self._is_done or not main.reader.finished:
            return
        if urgent is not None and memory.waited and not urgent.reader.finished:
            return
        memory.release()
        self._is_done = True
        self._tell("done", pages=memory.pages, requests=memory.requests)

    def _lose(self, reason: str) -> None:
        """The connection is of no more use."""
        self._hang_up()
        if self._is_done:
            return
        if self._keeps:
            self._tell("paused", reason=reason)
        elif self._memory is not None:
            self._memory.release()
            self._memory = None
            self._poll.unregister(self._faults)
            self._tell("failed", reason=reason)

    def _hang_up(self) -> None:
        for link in (self._main, self._urgent):
            if link is not None:
                with contextlib.suppress(KeyError):
                    self._poll.unregister(link.sock)
                link.sock.close()
        self._main = self._urgent = None
        self._asks = self._owes_word = False
        self._unsent.clear()

    # The other side

    def _obey(self) -> bool:
        """Do what the process of the machine wants; false where there is no more to come."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE, 3)
        except OSError:
            return False
        if not data:
            return False
        message = json.loads(data)
        try:
            self._do(message, descriptors)
        except VmferryError as error:
            self._lose(str(error))
        except OSError as error:
            self._lose(f"the host does not take a page: {error.strerror}")
        return True

    def _do(self, message: dict[str, Any], descriptors: Sequence[int]) -> None:
        match message:
            case {"do": "memory", "blocks": blocks, "threads": threads}:
                self._faults, marks = descriptors
                mapped = [MappedBlock(n, s, first, tuple(at)) for n, s, first, at in blocks]
                total = sum(block.size for block in mapped) // PAGE_SIZE
                shared = Shared(marks, total, threads)
                os.close(marks)
                self._bitmaps = total // 8
                self._memory = MissingMemory(
                    self._faults,
                    shared.marks,
                    shared.asked,
                    mapped,
                    Waits(threads, shared.times),
                )
                self._poll.register(self._faults, select.POLLIN)
            case {"do": "stream", "start": start, "recovery": recovery}:
                main, head = descriptors
                self._hang_up()
                self._idle = message["idle"]
                self._words, self._source = list(message["words"]), list(message["source"])
                blocks = tuple(RamBlock(name, size) for name, size in start.pop("blocks"))
                self._start = Continuation(blocks, **start)
                self._asks = not recovery
                reader = PostcopyReader(self._start, recovery=recovery)
                self._main = Link(socket.socket(fileno=main), reader)
                self._poll.register(main, select.POLLIN)
                self._heard = time.monotonic()
                with os.fdopen(head, "rb") as file:
                    file.seek(0)
                    read = file.read()
                if read:
                    for event in reader.feed(read):
                        self._handle(event)
            case {"do": "urgent"}:
                (urgent,) = descriptors
                if self._start is None or self._main is None:
                    os.close(urgent)  # the connection that it belongs to is lost
                    return
                self._urgent = Link(socket.socket(fileno=urgent), UrgentReader(self._start))
                if self._asks:  # before a recovery goes on nothing is for this side
                    self._poll.register(urgent, select.POLLIN)
            case {"do": "keep"}:
                self._keeps = True
                self._tell("kept", descriptors=[self._faults])
            case {"do": "say", "data": data}:
                self._send(bytes.fromhex(data))
            case {"do": "flush"}:
                self._owes_word = self._main is not None
                self._flush()

    def _tell(self, event: str, *, descriptors: Sequence[int] = (), **more: Any) -> None:
        data = json.dumps({"event": event} | more).encode()
        with contextlib.suppress(OSError):  # it is gone, and so is this process soon
            socket.send_fds(self._control, [data], descriptors)

    def _leave(self) -> None:
        """Send what was said last."""
        if self._main is None or not self._unsent:
            return
        self._main.sock.settimeout(_FAREWELL)
        with contextlib.suppress(OSError):
            self._main.sock.sendall(self._unsent)


def _cut_off() -> PeerError:
    return PeerError("the source closed the connection before it had sent everything")


def describe(start: Continuation) -> dict[str, Any]:
    """*start* as it stands in a message."""
    blocks = [[block.name, block.length] for block in start.blocks]
    return asdict(start) | {"blocks": blocks}


def main() -> None:
    """Serve the socket that standard input is."""
    with socket.socket(fileno=os.dup(0)) as control:
        Pager(control).run()


if __name__ == "__main__":
    main()
