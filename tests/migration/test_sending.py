"""A source whose destination refuses, dies, or no longer reads: one error, soon, nothing left."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.migration.machines import PAGE_SIZE, Resting, noise
from tests.transports.support import PROMPT, background, receive, wait_until
from tests.wire.feeding import read
from vmferry import (
    ChannelClosed,
    Method,
    PeerError,
    Progress,
    SendOptions,
    StorageError,
    TransportError,
)
from vmferry.migration.progress import Meter
from vmferry.migration.source import Source
from vmferry.transports import Channel, connect, listen
from vmferry.wire.ram import RamBlock, RamBlocks
from vmferry.wire.reader import StreamReader
from vmferry.wire.return_path import Message, Pong, RequestPages, Shut, SwitchoverAck

BIG = Resting(memories={"pc.ram": noise(1, 48 << 20)})
"""More than all buffers on the way hold."""


class Sending:
    """A source at work in a thread, and the destination's ends of its channels."""

    def __init__(self, machine: Resting, stack: ExitStack, options: SendOptions) -> None:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmferry-")))
        listener = stack.enter_context(listen(f"unix:{home}/socket"))
        self.phases: list[str] = []
        self.source = Source(
            machine,
            lambda _: connect(listener.address),
            options=options,
            meter=Meter(self._report),
        )
        self.outcome: Future[None] = background(self.source.run)
        self.channels: list[Channel] = []
        for _ in range(options.multifd + 1):
            channel = listener.accept(PROMPT)
            assert channel is not None
            self.channels.append(stack.enter_context(channel))

    def _report(self, progress: Progress) -> None:
        self.phases.append(progress.phase)

    @property
    def main(self) -> Channel:
        return self.channels[0]

    def answer(self, *messages: Message) -> None:
        self.main.send([message.encode() for message in messages])

    def confirm(self, *messages: Message) -> None:
        """Say that the machine is loaded, behind *messages*, once all of it was sent."""
        wait_until(lambda: "loading" in self.phases)
        self.answer(*messages, Shut(0))

    def read_all(self) -> list[Future[bytes]]:
        """Take everything that comes on every channel."""
        return [background(lambda channel=channel: receive(channel)) for channel in self.channels]

    def close(self) -> None:
        for channel in self.channels:
            channel.close()

    def error(self, kind: type[BaseException], within: float = 10.0) -> str:
        """What the source raised, soon."""
        error = self.outcome.exception(within)
        assert isinstance(error, kind), error
        assert self.phases[-1] == "failed"
        return str(error)


Start = Callable[..., Sending]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a source; when the test is over nothing of it may be left."""
    before = set(threading.enumerate())
    with ExitStack() as stack:

        def begin(machine: Resting = BIG, **options: object) -> Sending:
            return Sending(machine, stack, SendOptions(**options))  # type: ignore[arg-type]

        yield begin
    wait_until(lambda: set(threading.enumerate()) <= before)


CHANNELS = pytest.mark.parametrize("channels", [0, 1, 3])


@CHANNELS
def test_refusal_in_the_middle_is_told_as_one(start: Start, channels: int) -> None:
    sending = start(multifd=channels)
    receive(sending.main, 30)
    sending.answer(Pong(1), Shut(1))
    sending.close()
    assert "the destination refused the machine" in sending.error(PeerError)


@CHANNELS
def test_destination_that_dies_in_the_middle_is_an_error_of_the_network(
    start: Start, channels: int
) -> None:
    sending = start(multifd=channels)
    receive(sending.main, 30)
    sending.close()
    sending.error(TransportError)


@pytest.mark.parametrize("dead", [0, 1, 3])
def test_one_channel_that_dies_ends_the_others(start: Start, dead: int) -> None:
    sending = start(multifd=3)
    receive(sending.channels[dead], 30)
    sending.channels[dead].close()
    sending.error(TransportError)


def test_channel_that_dies_when_everything_is_queued_ends_the_others(start: Start) -> None:
    """The source waits for channels that are blocked, and not for a place in the queue."""
    sending = start(Resting(memories={"pc.ram": noise(1, 6 << 20)}), multifd=3)
    for channel in sending.channels:
        receive(channel, 30)
    time.sleep(0.2)  # until the others are blocked; without it this would be the test above
    sending.channels[1].close()
    sending.error(TransportError)


@CHANNELS
def test_destination_that_stops_reading_has_a_deadline(start: Start, channels: int) -> None:
    sending = start(multifd=channels, idle=0.3)
    assert "waited 300 ms for" in sending.error(TransportError)


@CHANNELS
def test_cancelled_while_nobody_reads_it_ends_at_once(start: Start, channels: int) -> None:
    sending = start(multifd=channels)
    receive(sending.main, 30)
    sending.source.cancel()
    sending.error(ChannelClosed)


def test_cancelled_while_it_waits_for_its_rate_it_ends_at_once(start: Start) -> None:
    sending = start(bandwidth=0.01)
    sending.source.cancel()
    sending.error(ChannelClosed)


def test_interrupted_while_channels_are_blocked_it_ends_at_once(start: Start) -> None:
    class Damaged(Resting):
        def memory(self, block: RamBlock) -> object:
            if block.name == "bad":
                raise StorageError("damaged")
            return super().memory(block)

    sending = start(
        Damaged(memories={"pc.ram": noise(1, 6 << 20), "bad": noise(2, 4096)}), multifd=2
    )
    assert sending.error(StorageError) == "damaged"


def test_answer_has_a_deadline_that_other_messages_do_not_move(start: Start) -> None:
    sending = start(Resting(), answer=0.4)
    reading = sending.read_all()
    began = time.monotonic()
    while not sending.outcome.done() and time.monotonic() - began < 3:
        try:
            sending.answer(Pong(1))
        except TransportError:
            break
    assert "waited 400 ms for the destination's answer" in sending.error(TransportError)
    assert time.monotonic() - began < 2
    # Answers that the source did not read any more may break the connection as it closes.
    assert isinstance(reading[0].exception(PROMPT), TransportError | None)


@pytest.mark.parametrize("message", [RequestPages(0, 4096, "pc.ram"), RequestPages(0, 4096)])
def test_requests_for_pages_are_out_of_place(start: Start, message: Message) -> None:
    sending = start(Resting())
    sending.answer(message)
    assert "as if this were postcopy" in sending.error(PeerError)


def test_success_before_anything_was_sent_is_none(start: Start) -> None:
    sending = start(BIG)
    sending.answer(Shut(0))
    assert "a machine that was not sent yet" in sending.error(PeerError)


def test_success_is_heard_behind_other_answers_and_phases_end_with_it(start: Start) -> None:
    sending = start(Resting(), answer=PROMPT)
    reading = sending.read_all()
    sending.confirm(SwitchoverAck(), Pong(1))
    sending.outcome.result(PROMPT)
    outcome = read(StreamReader(), [reading[0].result(PROMPT)])
    assert outcome.error is None
    assert outcome.finished
    assert sending.phases == ["active", "device", "loading", "completed"]


def test_page_sizes_of_blocks_are_left_out_as_no_postcopy_is_announced(start: Start) -> None:
    class Huge(Resting):
        @property
        def blocks(self) -> list[RamBlock]:
            return [RamBlock("pc.ram", 2 << 20, page_size=2 << 20)]

    sending = start(Huge(memories={"pc.ram": bytes(2 << 20)}))
    reading = sending.read_all()
    sending.confirm()
    sending.outcome.result(PROMPT)
    reader = StreamReader()
    events = list(reader.feed(reading[0].result(PROMPT)))
    assert RamBlocks((RamBlock("pc.ram", 2 << 20),)) in events


@pytest.mark.parametrize(
    ("channels", "method"),
    [(0, Method.NONE), *itertools.product((1, 3), (Method.NONE, Method.ZLIB, Method.ZSTD))],
)
def test_rate_limit_holds_over_all_channels(start: Start, channels: int, method: Method) -> None:
    machine = Resting(memories={"pc.ram": noise(1, 1 << 20)})
    sending = start(machine, multifd=channels, method=method, bandwidth=4 << 20)
    began = time.monotonic()
    reading = sending.read_all()
    sending.confirm()
    sending.outcome.result(PROMPT)
    total = sum(len(future.result(PROMPT)) for future in reading)
    assert total > 256 * PAGE_SIZE * (method == Method.NONE)
    assert time.monotonic() - began > total / (4 << 20) - 0.1
