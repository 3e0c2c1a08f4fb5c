"""Multifd channels that go wrong, or mean ill: decided at once, whatever the others do."""

from __future__ import annotations

import pytest

from tests.migration.attempts import Attempt, decided_soon
from tests.migration.script import (
    NEW,
    PAGE_SIZE,
    ROM,
    devices,
    end,
    fill,
    head,
    hello,
    packet,
    page,
    part,
    start,
    sync,
)
from tests.transports.support import PROMPT, background
from vmferry import (
    Deadlines,
    LimitExceeded,
    PeerError,
    StreamError,
    TransportError,
    TruncatedStream,
    VmferryError,
)
from vmferry.wire.commands import Ping, PostcopyAdvise, RamDiscard
from vmferry.wire.multifd import Method
from vmferry.wire.ram import RamFlush
from vmferry.wire.return_path import Pong

OPEN = head(return_path=True)
RUNNING = OPEN + start()
READY = hello(0) + sync()


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


BAD_HELLO = {
    "version": (changed(hello(0), 4, b"\0\0\0\2"), "version"),
    "cut off": (hello(0)[:40], "an initial packet"),
}

BAD_PACKETS = {
    "junk": (b"\x42" * 2000, "a packet with magic"),
    "version": (changed(packet([1], 1), 4, b"\0\0\0\2"), "version"),
    "flags": (changed(packet([1], 1), 8, b"\x80\0\0\0"), "flags"),
    "device state": (changed(packet([1], 1), 8, (64).to_bytes(4)), "device state"),
    "unknown compression": (packet([1], 1, method=Method.QATZIP), "compression qatzip"),
    "too many pages": (changed(packet([1], 1), 16, (129).to_bytes(4)), "128 pages"),
    "pages that wrap": (changed(packet([1], 1), 32, b"\xff\xff\xff\xff"), "128 pages"),
    "too few bytes": (packet([1, 2], payload=fill(1)), "8192 bytes"),
    "huge payload": (packet([1], payload_size=(1 << 32) - 1, method=Method.ZSTD), "payload"),
    "unknown block": (changed(packet([1], 1), 64, b"other\0\0\0"), '"other"'),
    "page outside": (packet([64], 1), "offsets of pages"),
    "page of the smaller block": (packet([4], 1, block=ROM), "offsets of pages"),
    "offset not a page's": (changed(packet([1], 1), 320, (5).to_bytes(8)), "offsets of pages"),
    "not zlib": (packet([1], payload=fill(1), method=Method.ZLIB), "zlib"),
    "not zstd": (packet([1], payload=fill(1), method=Method.ZSTD), "zstd"),
    "two compressions": (
        packet([1], 1) + packet([1], payload=fill(1), method=Method.ZLIB),
        "compression none as before",
    ),
}


@pytest.mark.parametrize("name", BAD_HELLO)
def test_bad_beginning_of_a_channel_is_refused_at_once(name: str) -> None:
    bad, words = BAD_HELLO[name]
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(bad).end()
        main.say(start())
        with decided_soon():
            assert main.verdict() == 1
            assert words in str(attempt.error(StreamError))


@pytest.mark.parametrize("name", BAD_PACKETS)
def test_bad_packet_is_refused_at_once_while_all_others_are_silent(name: str) -> None:
    bad, words = BAD_PACKETS[name]
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        peers = [attempt.connect(hello(number), sync()) for number in range(3)]
        main.say(start(), part()[:9])
        with decided_soon():
            peers[1].say(bad)
            assert main.verdict() == 1
            for peer in peers:
                peer.ends()
            error = attempt.error(StreamError)
        assert words in str(error)
        assert error.place.channel == "multifd 1"
        assert error.place.offset == len(READY) + (
            len(packet([1], 1)) if name == "two compressions" else 0
        )


def test_same_number_twice_is_refused() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(READY)
        attempt.connect(READY)
        main.say(start())
        with decided_soon():
            assert main.verdict() == 1
            error = attempt.error(StreamError)
        assert "channel 0 again" in str(error)
        assert error.place.channel == "multifd 0"


def test_same_number_twice_is_refused_while_no_main_channel_has_come() -> None:
    with Attempt() as attempt:
        one = attempt.connect(READY)
        two = attempt.connect(READY)
        with decided_soon():
            one.ends()
            two.ends()
            attempt.error(StreamError)


@pytest.mark.parametrize("size", [1, 63, 64, 320, 1344, 1400], ids=str)
def test_channel_closed_inside_a_packet_is_a_truncated_stream(size: int) -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        peer = attempt.connect(READY)
        main.say(start(), part()[:9])
        with decided_soon():
            peer.say(packet([1], 1)[:size])
            peer.end()
            assert main.verdict() == 1
            error = attempt.error(TruncatedStream)
        assert error.place.channel == "multifd 0"


@pytest.mark.parametrize("said", [hello(0), READY], ids=["first", "second"])
def test_channel_closed_before_a_synchronisation_ends_the_wait_for_it(said: bytes) -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        peer = attempt.connect(said)
        attempt.connect(hello(1), sync(), sync(), sync())
        main.say(start(), part(), end(), devices())
        with decided_soon():
            peer.end()
            assert main.verdict() == 1
            assert "the source closed multifd channel 0" in str(attempt.error(PeerError))


def test_channel_that_never_synchronises_has_a_deadline() -> None:
    with Attempt(deadlines=Deadlines(PROMPT, PROMPT, 0.2)) as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(READY)
        attempt.connect(hello(7), packet([1], 1))
        main.say(start())
        assert main.verdict() == 1
        error = attempt.error(TransportError)
        assert str(error) == "waited 0.2 s for synchronisation 1 of multifd channel 7"


def test_channel_that_never_says_its_number_has_a_deadline() -> None:
    with Attempt(deadlines=Deadlines(PROMPT, PROMPT, 0.2)) as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(hello(0)[:30])
        main.say(start())
        assert main.verdict() == 1
        assert "1 connection(s) that never said who" in str(attempt.error(TransportError))


def test_connection_that_never_says_what_it_is_has_a_deadline() -> None:
    with Attempt(deadlines=Deadlines(PROMPT, 0.2, PROMPT)) as attempt:
        main = attempt.connect(OPEN)
        attempt.connect()
        main.say(start())
        assert main.verdict() == 1
        attempt.error(TransportError)


def test_one_silent_connection_may_be_for_preemption_but_not_two() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN, PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode())
        attempt.connect()
        attempt.connect()
        main.say(start())
        assert main.verdict() == 1
        assert "one preempt channel" in str(attempt.error(PeerError))


def test_preempt_channel_that_speaks_up_does_not_hide_the_switch_to_postcopy() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN, PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode(), start())
        attempt.connect(bytes(16))
        main.say(part(), RamDiscard("pc.ram", ((0, PAGE_SIZE),)).encode())
        assert main.verdict() == 1
        assert "switched to postcopy" in str(attempt.error(PeerError))


def test_channel_that_comes_too_late_is_refused() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(READY, sync(), sync())
        main.say(start(), part(), Ping(2).encode())
        main.await_answer(Pong(2))
        attempt.connect(hello(1))
        main.say(part())
        assert main.verdict() == 1
        assert "too late to take part" in str(attempt.error(PeerError))


def test_pages_behind_the_last_synchronisation_never_count() -> None:
    # Nobody waits for them.  Either they are noticed in time, or they are not stored.
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        attempt.connect(READY, sync(), packet([2], 2), sync(), packet([1], 1))
        main.say(start(), part(), end(), devices())
        if main.verdict() == 0:
            attempt.checkpoint().verify()
        else:
            error = attempt.error(StreamError)
            assert "no pages behind the last synchronisation" in str(error)
            assert error.place.channel == "multifd 0"


def test_channels_that_flood_before_the_main_channel_wait_for_it() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(READY)
        flooding = background(lambda: peer.say(*[packet([1], 1)] * 1000, sync(), sync()))
        main = attempt.connect(OPEN, start(), part(), end(), devices())
        assert main.verdict() == 0
        flooding.result(PROMPT)
        attempt.checkpoint().verify()


def test_main_channel_that_breaks_closes_the_others_at_once() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        peers = [attempt.connect(hello(number), sync()) for number in range(3)]
        main.say(start())
        flooding = background(lambda: peers[0].say(*[packet([1], 1)] * 100_000))
        with decided_soon():
            main.say(b"\x42")
            assert main.verdict() == 1
            for peer in peers[1:]:
                peer.ends()
            attempt.error(StreamError)
        with pytest.raises(TransportError):
            flooding.result(PROMPT)


def test_channel_that_fails_while_the_main_channel_is_flooded_stops_both() -> None:
    def flood() -> None:
        while True:
            main.say(part(page(1, 1)))

    # By flushes alone, so that nothing on the main channel waits.
    with Attempt() as attempt:
        main = attempt.connect(head(NEW, return_path=True))
        peer = attempt.connect(READY)
        main.say(start(RamFlush().encode()))
        flooding = background(flood)
        with decided_soon():
            peer.say(b"\x42" * 2000)
            peer.ends()
            attempt.error(StreamError)
        with pytest.raises(TransportError):
            flooding.result(PROMPT)
        assert main.verdict() == 1


def test_more_connections_than_any_source_has_are_refused() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        for number in range(257):
            attempt.connect(hello(number % 256))
        main.say(start())
        assert main.verdict() == 1
        attempt.error(VmferryError)


def test_255_channels_are_received() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        for number in range(255):
            attempt.connect(hello(number), sync(), packet([number % 64], number), sync(), sync())
        main.say(start(), part(), end(), devices())
        assert main.verdict(12 * PROMPT) == 0
        attempt.checkpoint().verify()


def test_silent_connection_holds_up_no_failure_of_a_channel() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        peer = attempt.connect(hello(0))
        attempt.connect()
        main.say(start())
        with decided_soon():
            peer.say(b"\x42" * 2000)
            assert main.verdict() == 1
            attempt.error(StreamError)


def test_limit_of_connections_is_the_reason() -> None:
    with Attempt() as attempt:
        main = attempt.connect(OPEN)
        for _ in range(257):
            attempt.connect()
        main.say(start())
        assert main.verdict() == 1
        assert "at most 257 connections" in str(attempt.error(LimitExceeded))
