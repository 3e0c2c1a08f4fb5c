"""What was read ahead is lent to a parser's buffer, or copied into it."""

from __future__ import annotations

import random
from unittest.mock import patch

import pytest

from tests.transports.support import PROMPT, background, noise
from vmferry.errors import ChannelClosed, TransportError
from vmferry.transports import ReadAhead, memory_pair, readahead
from vmferry.wire.buffer import ReceiveBuffer


@pytest.mark.parametrize("seed", range(12))
def test_a_parser_that_takes_any_pieces_sees_every_byte_once(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - nothing secret
    data = noise(seed, 300_000)
    sender, receiver = memory_pair()

    def send() -> None:
        at = 0
        while at < len(data):
            size = dice.choice((1, 7, 900, 5000))
            sender.send([data[at : at + size]])
            at += size
        sender.end_of_data()

    capacity, head = dice.choice(((4096, 0), (4096, 100), (8192, 1 << 16), (50_000, 3)))
    took = random.Random(~seed)  # noqa: S311 - nothing secret
    with patch.object(readahead, "_HEAD", head), ReadAhead(receiver, capacity) as ahead:
        sending = background(send)
        buffer = ReceiveBuffer(took.choice((256, 1 << 16)))
        seen = bytearray()
        need, borrowed = 1, 0
        while not buffer.ended:
            before = len(buffer)
            assert ahead.receive(buffer, PROMPT) == len(buffer) - before
            borrowed += buffer.borrows
            while len(buffer) >= need:
                seen += buffer.peek(need)
                buffer.advance(need)
                # Now and then more than all that is read ahead, as the state of devices may be.
                need = took.choice((1, 8, 4104, 4104, 100, capacity + 5000))
        seen += buffer.view()
        assert bytes(seen) == data
        assert buffer.offset + len(buffer) == len(data)
        assert borrowed
        sending.result(PROMPT)


def test_what_came_before_an_error_is_received_before_it() -> None:
    sender, receiver = memory_pair()
    with ReadAhead(receiver) as ahead:
        buffer = ReceiveBuffer()
        sender.send([b"12345"])
        assert ahead.receive(buffer, PROMPT) == 5
        buffer.advance(2)
        with pytest.raises(TransportError, match="waited 10 ms for data"):
            ahead.receive(buffer, 0.01)
        assert bytes(buffer.view()) == b"345"
        ahead.shutdown()
        with pytest.raises(ChannelClosed):
            ahead.receive(buffer, PROMPT)
