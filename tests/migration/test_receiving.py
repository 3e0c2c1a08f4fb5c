"""Sources that mean well, in all the ways in which they send."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
import zstandard

from tests.migration.attempts import Attempt, Peer
from tests.migration.script import (
    NEW,
    OLD,
    PAGE_SIZE,
    RAM,
    ROM,
    devices,
    end,
    fill,
    head,
    hello,
    packet,
    page,
    part,
    plain,
    start,
    sync,
    zero,
)
from tests.transports.support import wait_until
from vmferry import Checkpoint, Tolerate
from vmferry.wire.commands import Ping, PostcopyAdvise
from vmferry.wire.multifd import Method
from vmferry.wire.ram import RamBlock, RamFlush
from vmferry.wire.return_path import Pong, Shut, SwitchoverAck
from vmferry.wire.sections import EndOfStream, Header

FLUSH = RamFlush().encode()


def content(checkpoint: Checkpoint, block: RamBlock = RAM) -> dict[int, int]:
    """Pages that are not zero, each with its byte; and every page fits its sum."""
    checkpoint.verify()
    memory = checkpoint.memory(block)
    assert memory is not None
    found = {}
    for number in np.flatnonzero(memory.sums).tolist():
        data = bytearray(PAGE_SIZE)
        memory.read(number * PAGE_SIZE, memoryview(data))
        assert len(set(data)) == 1
        found[number] = data[0]
    return found


def test_plain_stream_is_received() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(plain(page(1, 7), page(2, 8), zero(2), page(3, 9, ROM)))
        peer.end()
        assert peer.verdict() is None
        checkpoint = attempt.checkpoint()
        assert content(checkpoint, RAM) == {1: 7}
        assert content(checkpoint, ROM) == {3: 9}
        assert checkpoint.manifest.machine == OLD
        assert checkpoint.manifest.capabilities == ()


def test_byte_by_byte_is_the_same() -> None:
    stream = plain(page(1, 7), zero(2), return_path=True)
    with Attempt() as attempt:
        peer = attempt.connect()
        for at in range(len(stream)):
            peer.say(stream[at : at + 1])
        assert peer.answers() == [Pong(1), Shut(0)]
        assert content(attempt.checkpoint()) == {1: 7}


@pytest.mark.parametrize("machine", [OLD, "pc-q35-8.0", "microvm", None])
def test_return_path_is_answered_pong_by_pong_and_success_once(machine: str | None) -> None:
    with Attempt() as attempt:
        peer = attempt.connect(
            head(machine, return_path=True), Ping(17).encode(), plain(page(1, 7))[len(head()) :]
        )
        assert peer.answers() == [Pong(1), Pong(17), Shut(0)]
        assert "return-path" in attempt.checkpoint().manifest.capabilities


@pytest.mark.parametrize("machine", [NEW, "pc-q35-9.0", "virt-10.1"])
def test_switchover_is_acknowledged_to_machines_from_8_1_on(machine: str) -> None:
    with Attempt() as attempt:
        peer = attempt.connect(plain(machine=machine, return_path=True))
        assert peer.answers() == [SwitchoverAck(), Pong(1), Shut(0)]
        attempt.checkpoint()


def test_success_is_told_only_when_the_checkpoint_is_complete() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(plain(page(1, 7), return_path=True))
        assert peer.verdict() == 0
        Checkpoint(attempt.directory, verify=True).close()


def test_source_that_may_switch_to_postcopy_is_received_while_it_does_not() -> None:
    advise = PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode()
    with Attempt() as attempt:
        stream = plain(page(1, 7))
        peer = attempt.connect(head(return_path=True), advise, stream[len(head()) :])
        assert peer.answers() == [Pong(1), Shut(0)]
        assert "postcopy-ram" in attempt.checkpoint().manifest.capabilities


def test_machine_without_configuration_or_memory_is_received_where_that_is_accepted() -> None:
    with Attempt(tolerate=Tolerate.NO_RAM) as attempt:
        attempt.connect(Header().encode(), EndOfStream().encode()).end()
        checkpoint = attempt.checkpoint()
        assert checkpoint.manifest.machine is None
        assert checkpoint.blocks == ()


# multifd


@pytest.mark.parametrize("order", list(itertools.permutations(["main", 0, 1])), ids=str)
def test_connections_may_come_in_any_order(order: tuple[str | int, ...]) -> None:
    # START, PART and END synchronise.
    streams = {
        "main": [head(return_path=True), start(), part(page(5, 5)), end(), devices()],
        0: [hello(0), sync(), packet([1, 2], 1), sync(), sync()],
        1: [hello(1), sync(), packet([3], 2), sync(), sync()],
    }
    with Attempt() as attempt:
        peers = {name: attempt.connect() for name in order}
        for name in order:
            peers[name].say(*streams[name])
        assert peers["main"].verdict() == 0
        checkpoint = attempt.checkpoint()
        assert content(checkpoint) == {1: 1, 2: 1, 3: 2, 5: 5}
        assert "multifd" in checkpoint.manifest.capabilities


def test_channel_that_closes_at_the_end_is_no_failure() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        peer = attempt.connect(hello(0), sync(), packet([1], 1), sync(), sync())
        peer.end()
        main.say(start(), part(), end(), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 1}


def test_synchronisation_may_stand_on_a_packet_of_pages_with_an_empty_one_behind() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        empty = packet(payload_size=524288)
        attempt.connect(hello(0), sync(), packet([1], 1, sync=True), empty, sync(), empty)
        main.say(start(), part(), end(), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 1}


def test_empty_packets_may_repeat_what_an_older_one_said() -> None:
    stale = bytearray(packet([1, 63], 9))[: -2 * PAGE_SIZE]
    stale[16:20] = bytes(4)  # no pages, but their name, sizes and offsets
    stale[64:320] = b"no such block".ljust(256, b"\0")
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        attempt.connect(hello(0), sync(), packet([1], 1), stale, sync(), sync(), stale)
        main.say(start(), part(), end(), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 1}


def test_zero_pages_in_packets_clear_pages() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        attempt.connect(
            hello(0), sync(), packet([1, 2], 1), sync(), packet([4], 4, zeros=[2, 3, 60]), sync()
        )
        main.say(start(), part(page(3, 3)), end(), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 1, 4: 4}


def test_machines_from_8_1_on_synchronise_at_flushes_alone() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(NEW, return_path=True))
        attempt.connect(hello(0), sync(), packet([1], 1), sync(), packet([2], 2), sync(), sync())
        main.say(start(FLUSH), part(), part(FLUSH), part(), end(FLUSH, FLUSH), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 1, 2: 2}


@pytest.mark.parametrize("method", [Method.ZLIB, Method.ZSTD])
def test_compressed_packets_are_one_stream_a_channel(method: Method) -> None:
    if method == Method.ZLIB:
        deflater = zlib.compressobj(1)
        packs = [deflater.compress(fill(v)) + deflater.flush(zlib.Z_SYNC_FLUSH) for v in (1, 2)]
    else:
        stream = zstandard.ZstdCompressor().compressobj()
        flush = zstandard.COMPRESSOBJ_FLUSH_BLOCK
        packs = [stream.compress(fill(v)) + stream.flush(flush) for v in (1, 2)]
    first, second = (
        packet([number], payload=data, method=method) for number, data in enumerate(packs, 1)
    )
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        attempt.connect(hello(0), sync(), first, sync(), second, sync())
        main.say(start(), part(), end(), devices())
        assert main.verdict() == 0
        checkpoint = attempt.checkpoint()
        assert content(checkpoint) == {1: 1, 2: 2}
        assert f"multifd-compression={method.name.lower()}" in checkpoint.manifest.capabilities


def test_preempt_channel_that_stays_silent_is_left_alone() -> None:
    advise = PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode()
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True), advise)
        attempt.connect()
        main.say(start(), part(page(1, 7)), end(), devices())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 7}


# What is newer wins, whatever comes first


def received_whole(peer: Peer) -> bool:
    return peer.channel.unsent() == 0


def test_zero_page_of_a_later_round_wins_over_data_of_an_earlier_one_that_comes_late() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        channel = attempt.connect(hello(0), sync())
        main.say(start(), part(), part(zero(1)), end(), devices())
        wait_until(lambda: received_whole(main))
        channel.say(packet([1], 9), sync(), sync(), sync())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {}


def test_data_of_a_later_round_wins_over_a_zero_page_of_an_earlier_one_that_comes_late() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True))
        channel = attempt.connect(hello(0), sync())
        main.say(start())
        wait_until(lambda: received_whole(channel))
        channel.say(packet([1], 3), sync(), packet([1], 9), sync())
        main.say(part(zero(1)), part(), end(), devices())
        channel.say(sync())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 9}


def test_channels_of_one_round_do_not_overtake_each_other_into_the_next() -> None:
    with Attempt() as attempt:
        main = attempt.connect(head(return_path=True), start())
        quick = attempt.connect(hello(0), sync(), sync())
        slow = attempt.connect(hello(1), sync())
        main.say(part())
        wait_until(lambda: received_whole(quick))
        quick.say(packet([1], 2), sync())
        slow.say(packet([1], 1), sync())
        main.say(end(), devices())
        slow.say(sync())
        assert main.verdict() == 0
        assert content(attempt.checkpoint()) == {1: 2}
