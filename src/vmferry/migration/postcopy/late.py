"""What a machine that has all of its memory says to a source that did not hear so.

The last word of a destination is lost where the connection breaks behind it; its source is paused
then, and comes back to hear what is missing: nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from vmferry.errors import PeerError
from vmferry.transports import Channel
from vmferry.wire.commands import Ping, PostcopyResume, ReceivedBitmap
from vmferry.wire.postcopy import Continuation, PostcopyReader
from vmferry.wire.return_path import HavePages, Message, Pong, ResumeAck, Shut
from vmferry.wire.sections import EndOfStream

PATIENCE: Final = 60.0
"""Seconds that such a source has in all."""


def say_that_all_came(channel: Channel, start: Continuation, source: Sequence[int]) -> None:
    """Answer a source that recovers, which has to be the one that said it is *source* before.

    Whatever of memory it sends is there already.  Raises
    :class:`~vmferry.errors.VmferryError` where it is another one, or says anything else.
    """
    deadline = time.monotonic() + PATIENCE
    sizes = {block.name: block.length // start.page_size for block in start.blocks}
    owed = list(source)

    def say(message: Message) -> None:
        channel.send([message.encode()], PATIENCE)

    reader = PostcopyReader(start, recovery=True)
    while not reader.finished:
        left = max(deadline - time.monotonic(), 0.001)
        reader.buffer.received(channel.recv_into(reader.buffer.room(), left))
        if time.monotonic() > deadline:
            raise PeerError("the source asks what has come, and does not go on")
        for event in reader.events():
            match event:
                case Ping(value) if owed[:1] == [value]:
                    del owed[0]
                case Ping(value):
                    say(Pong(value))
                case ReceivedBitmap(block) if block in sizes:
                    pages = sizes[block]
                    bitmap = ((1 << pages) - 1).to_bytes(-(-pages // 64) * 8, "little")
                    say(HavePages(block, bitmap))
                case ReceivedBitmap(block):
                    raise PeerError(f"the source asks for a block {block!r}, which is not there")
                case PostcopyResume() if owed:
                    raise PeerError("another source than that of the machine wants to go on")
                case PostcopyResume():
                    say(ResumeAck())
                case EndOfStream():
                    say(Shut(0))
