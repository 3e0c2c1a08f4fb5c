"""The promises of ``Channel``, asked of every transport in the same words."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.transports.support import (
    DUPLEX,
    ONE_WAY,
    PROMPT,
    Pair,
    background,
    blocked,
    noise,
    receive,
    wait_until,
)
from vmferry.errors import ChannelClosed, TransportError, UsageError
from vmferry.transports import Buffer, Channel, connect, listen

Maker = Callable[[Path], AbstractContextManager[Pair]]
MORE_THAN_FITS = 64 << 20


@pytest.fixture(params=DUPLEX + ONE_WAY, ids=lambda make: make.__name__)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """A sender and a receiver over each transport."""
    make: Maker = request.param
    with make(tmp_path) as channels:
        yield channels


@pytest.fixture(params=DUPLEX, ids=lambda make: make.__name__)
def duplex_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """Two ends that both send and receive."""
    make: Maker = request.param
    with make(tmp_path) as channels:
        yield channels


@pytest.fixture(params=ONE_WAY, ids=lambda make: make.__name__)
def one_way_pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    """A sender that cannot receive, and the other way round."""
    make: Maker = request.param
    with make(tmp_path) as channels:
        yield channels


def small_buffer() -> memoryview:
    return memoryview(bytearray(16))


def send_for_ever(channel: Channel) -> None:
    block = bytes(1 << 20)
    while True:
        channel.send([block])


def test_bytes_arrive_in_order(pair: Pair) -> None:
    sender, receiver = pair
    data = noise(1, 3 << 20)
    sending = background(
        lambda: [sender.send([data[i : i + 70001]]) for i in range(0, len(data), 70001)]
    )
    assert receive(receiver, len(data)) == data
    sending.result(PROMPT)


def test_parts_of_a_file_arrive_in_order(pair: Pair) -> None:
    sender, receiver = pair
    data = noise(3, 3 << 20)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()

        def send() -> None:

            sender.send_file(b"head", file.fileno(), 5, len(data) - 6)
            sender.send([b"tail"])

        sending = background(send)
        assert receive(receiver, len(data) + 2) == b"head" + data[5:-1] + b"tail"
        sending.result(PROMPT)


def test_a_file_that_is_too_short_is_an_error(pair: Pair) -> None:
    sender, _ = pair
    file = os.memfd_create("empty")
    with pytest.raises(UsageError, match="ends 7 bytes too early"):
        sender.send_file(b"", file, 0, 7)
    os.close(file)


def test_a_buffer_is_filled_whatever_pieces_come_and_as_far_as_the_stream_goes(pair: Pair) -> None:
    sender, receiver = pair
    data = noise(4, 1 << 20)

    def send() -> None:
        for at in range(0, len(data), 30_001):
            sender.send([data[at : at + 30_001]])
        sender.end_of_data()

    sending = background(send)
    buffer = memoryview(bytearray(700_000))
    assert receiver.fill(buffer) == 700_000
    assert buffer == data[:700_000]
    assert receiver.fill(buffer) == len(data) - 700_000
    assert buffer[: len(data) - 700_000] == data[700_000:]
    assert receiver.fill(buffer) == 0
    sending.result(PROMPT)


def test_thousands_of_parts_and_empty_ones_arrive_in_order(pair: Pair) -> None:
    sender, receiver = pair
    parts: list[Buffer] = [noise(i, (0, 0, 1, 8, 300)[i % 5]) for i in range(5000)]
    parts[0:0] = parts[4000:4000] = [b""] * 3000
    parts += [bytearray(noise(1, 4096)), memoryview(noise(2, 70000)), b"", b"\x01"]
    sending = background(lambda: sender.send(parts))
    assert receive(receiver, sum(len(part) for part in parts)) == b"".join(parts)
    sending.result(PROMPT)


def test_views_of_wider_items_are_sent_as_bytes(pair: Pair) -> None:
    sender, receiver = pair
    data = noise(3, 1 << 20)
    sending = background(lambda: sender.send([memoryview(data).cast("Q"), b"end"]))
    assert receive(receiver, len(data) + 3) == data + b"end"
    sending.result(PROMPT)


def test_sending_nothing_sends_nothing(pair: Pair) -> None:
    sender, receiver = pair
    sender.send([])
    sender.send([b"", bytearray(), memoryview(b"")])
    sender.send([b"x"])
    sender.end_of_data()
    assert receive(receiver) == b"x"


def test_receiver_sees_a_byte_as_soon_as_it_is_there(pair: Pair) -> None:
    sender, receiver = pair
    for byte in b"one at a time":
        sender.send([bytes([byte])])
        buffer = memoryview(bytearray(1000))
        assert receiver.recv_into(buffer, PROMPT) == 1
        assert buffer[0] == byte


def test_end_of_stream_is_zero_and_stays_zero(pair: Pair) -> None:
    sender, receiver = pair
    sender.send([b"last"])
    sender.end_of_data()
    sender.end_of_data()
    assert receive(receiver) == b"last"
    assert receiver.recv_into(small_buffer()) == 0
    assert receiver.recv_into(small_buffer(), 0) == 0


def test_end_comes_only_behind_all_that_was_sent(pair: Pair) -> None:
    sender, receiver = pair
    data = noise(4, 2 << 20)

    def send() -> None:
        sender.send([data])
        sender.end_of_data()

    sending = background(send)
    assert receive(receiver, step=5000) == data
    sending.result(PROMPT)


def test_sending_after_the_end_is_a_usage_error(pair: Pair) -> None:
    sender, _ = pair
    sender.end_of_data()
    with pytest.raises(UsageError, match="end of the data"):
        sender.send([b"more"])


def test_receiving_into_an_empty_buffer_is_a_usage_error(pair: Pair) -> None:
    with pytest.raises(UsageError, match="at least one byte"):
        pair[1].recv_into(memoryview(b""))


def test_silence_ends_in_an_error_that_names_the_channel(pair: Pair) -> None:
    _, receiver = pair
    receiver.name = "main"
    with pytest.raises(TransportError, match=r'"main": waited 10 ms for data'):
        receiver.recv_into(small_buffer(), 0.01)


def test_channel_is_usable_after_a_timeout(pair: Pair) -> None:
    sender, receiver = pair
    with pytest.raises(TransportError):
        receiver.recv_into(small_buffer(), 0)
    sender.send([b"late"])
    assert receive(receiver, 4) == b"late"


def test_receiver_that_takes_nothing_ends_in_an_error_that_names_the_channel(pair: Pair) -> None:
    sender, _ = pair
    sender.name = "main"
    with pytest.raises(TransportError, match=r'"main": waited 10 ms .* to read on, it did not'):
        sender.send([bytes(MORE_THAN_FITS)], 0.01)
    sender.shutdown()


def test_slow_receiver_is_waited_for(pair: Pair) -> None:
    sender, receiver = pair
    for timeout in (PROMPT, None, PROMPT):
        sending = blocked(lambda: sender.send([bytes(MORE_THAN_FITS)], timeout))  # noqa: B023
        assert len(receive(receiver, MORE_THAN_FITS, step=1 << 20)) == MORE_THAN_FITS
        sending.result(PROMPT)


def test_clogged_sender_is_released_by_a_shutdown(pair: Pair) -> None:
    sender, _ = pair
    sending = blocked(lambda: send_for_ever(sender))
    sender.shutdown()
    with pytest.raises(ChannelClosed, match="shut down on this side"):
        sending.result(PROMPT)


def test_clogged_sender_learns_that_the_receiver_shut_down(pair: Pair) -> None:
    sender, receiver = pair
    sending = blocked(lambda: send_for_ever(sender))
    receiver.shutdown()
    with pytest.raises(TransportError) as caught:
        sending.result(PROMPT)
    assert not isinstance(caught.value, ChannelClosed)


def test_clogged_sender_goes_on_when_the_receiver_does(pair: Pair) -> None:
    sender, receiver = pair
    sending = blocked(lambda: sender.send([bytes(MORE_THAN_FITS)]))
    assert not sending.done()
    assert len(receive(receiver, MORE_THAN_FITS, step=1 << 20)) == MORE_THAN_FITS
    sending.result(PROMPT)


def test_waiting_receiver_is_released_by_a_shutdown(pair: Pair) -> None:
    _, receiver = pair
    waiting = blocked(lambda: receiver.recv_into(small_buffer()))
    receiver.shutdown()
    with pytest.raises(ChannelClosed):
        waiting.result(PROMPT)


def test_receiver_waiting_with_a_timeout_is_released_by_a_shutdown(pair: Pair) -> None:
    _, receiver = pair
    waiting = blocked(lambda: receiver.recv_into(small_buffer(), 100))
    receiver.shutdown()
    with pytest.raises(ChannelClosed):
        waiting.result(PROMPT)


def test_waiting_receiver_learns_that_the_sender_shut_down(pair: Pair) -> None:
    sender, receiver = pair
    waiting = blocked(lambda: receiver.recv_into(small_buffer()))
    sender.shutdown()
    error = waiting.exception(PROMPT)
    assert not isinstance(error, ChannelClosed)
    assert isinstance(error, TransportError) or waiting.result() == 0


def test_close_of_the_sender_ends_the_stream(pair: Pair) -> None:
    sender, receiver = pair
    sender.send([b"all"])
    sender.close()
    assert receive(receiver) == b"all"


def test_sender_learns_that_the_receiver_is_gone(pair: Pair) -> None:
    sender, receiver = pair
    receiver.close()
    with pytest.raises(TransportError) as caught:
        background(lambda: send_for_ever(sender)).result(PROMPT)
    assert not isinstance(caught.value, ChannelClosed)


def test_every_call_after_a_shutdown_says_so(pair: Pair) -> None:
    for channel in pair:
        channel.shutdown()
        channel.shutdown()
        calls: list[Callable[[], object]] = [channel.end_of_data]
        calls.append(lambda: channel.recv_into(small_buffer()))  # noqa: B023
        calls.append(lambda: channel.send([b"x"]))  # noqa: B023
        for call in calls:
            with pytest.raises((ChannelClosed, UsageError)):
                call()


def test_closing_twice_is_allowed(pair: Pair) -> None:
    for channel in pair:
        channel.close()
        channel.close()
        channel.shutdown()


def test_a_failure_inside_a_with_block_is_not_hidden(pair: Pair) -> None:
    sender, _ = pair
    sender.send([b"half"])
    with pytest.raises(ZeroDivisionError), sender:
        raise ZeroDivisionError


def test_unsent_is_zero_when_all_has_arrived(pair: Pair) -> None:
    sender, receiver = pair
    sender.send([b"x" * 1000])
    assert sender.unsent() >= 0
    receive(receiver, 1000)
    wait_until(lambda: sender.unsent() == 0)


def test_unsent_counts_what_the_peer_leaves_lying(duplex_pair: Pair) -> None:
    sender, _ = duplex_pair
    blocked(lambda: sender.send([bytes(MORE_THAN_FITS)]))
    assert sender.unsent() > 0


def test_return_path_works_after_the_end_of_the_data(duplex_pair: Pair) -> None:
    sender, receiver = duplex_pair
    assert sender.duplex
    assert receiver.duplex
    sender.send([b"stream"])
    sender.end_of_data()
    assert receive(receiver) == b"stream"
    receiver.send([b"thanks"])
    receiver.end_of_data()
    assert receive(sender) == b"thanks"


def test_both_directions_flow_at_the_same_time(duplex_pair: Pair) -> None:
    one, two = duplex_pair
    there, back = noise(5, 4 << 20), noise(6, 4 << 20)
    sending = [background(lambda: one.send([there])), background(lambda: two.send([back]))]
    receiving = background(lambda: receive(one, len(back)))
    assert receive(two, len(there)) == there
    assert receiving.result(PROMPT) == back
    for future in sending:
        future.result(PROMPT)


def test_shutdown_releases_both_directions(duplex_pair: Pair) -> None:
    channel, _ = duplex_pair
    sending = blocked(lambda: send_for_ever(channel))
    waiting = blocked(lambda: channel.recv_into(small_buffer()))
    channel.shutdown()
    assert isinstance(sending.exception(PROMPT), ChannelClosed)
    assert isinstance(waiting.exception(PROMPT), ChannelClosed)


def test_one_way_channel_refuses_the_other_way(one_way_pair: Pair) -> None:
    sender, receiver = one_way_pair
    assert not sender.duplex
    assert not receiver.duplex
    with pytest.raises(UsageError, match="only sends"):
        sender.recv_into(small_buffer())
    with pytest.raises(UsageError, match="only receives"):
        receiver.send([b"x"])
    receiver.end_of_data()


def test_file_keeps_order_and_ends_at_its_end(tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/stream"
    parts: list[Buffer] = [bytes([i % 251]) * (i % 7) for i in range(5000)]
    with connect(uri) as sender:
        assert not sender.duplex
        sender.send(parts)
        sender.send([bytes(20 << 20)])
        sender.end_of_data()
    with listen(uri) as listener, listener.accept() as receiver:  # type: ignore[union-attr]
        assert receive(receiver) == b"".join(parts) + bytes(20 << 20)
        assert receiver.recv_into(small_buffer()) == 0


def test_file_channel_keeps_the_rules_of_closing(tmp_path: Path) -> None:
    sender = connect(f"file:{tmp_path}/stream")
    sender.end_of_data()
    sender.end_of_data()
    with pytest.raises(UsageError):
        sender.send([b"x"])
    sender.shutdown()
    with pytest.raises(ChannelClosed):
        sender.send([b"x"])
    sender.close()
    sender.close()
