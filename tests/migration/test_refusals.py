"""Sources that go wrong, or mean ill, on the main channel: what they hear, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.migration.attempts import Attempt, Peer, decided_soon
from tests.migration.script import (
    BLOCKS,
    NEW,
    PAGE_SIZE,
    RAM,
    devices,
    end,
    fill,
    head,
    hello,
    page,
    part,
    plain,
    start,
    sync,
)
from tests.transports.support import PROMPT, background, blocked, wait_until
from vmferry import (
    ChannelClosed,
    Checkpoint,
    Deadlines,
    LimitExceeded,
    PeerError,
    Progress,
    StorageError,
    StreamError,
    TransportError,
    TruncatedStream,
    VmferryError,
)
from vmferry.pages import CONTINUE, XBZRLE
from vmferry.wire.buffer import encode_name
from vmferry.wire.commands import (
    EnableColo,
    OpenReturnPath,
    Package,
    Ping,
    PostcopyAdvise,
    PostcopyListen,
    PostcopyResume,
    PostcopyRun,
    RamDiscard,
    ReceivedBitmap,
)
from vmferry.wire.disk import DiskChunk, DiskEnd
from vmferry.wire.ram import RamBlock, RamBlocks, RamFlush
from vmferry.wire.return_path import Pong, Shut
from vmferry.wire.sections import SectionFooter, SectionStart

OPEN = head(return_path=True)
RUNNING = OPEN + start() + part(page(1, 7))
ADVISED = OPEN + PostcopyAdvise(PAGE_SIZE, PAGE_SIZE).encode() + start() + part(page(1, 7))
DISCARD = RamDiscard("pc.ram", ((0, PAGE_SIZE),)).encode()
PACKAGE = Package(PostcopyListen().encode() + PostcopyRun().encode()).encode()
XBZRLE_OVERRUN = (XBZRLE | CONTINUE).to_bytes(8) + b"\1\0\4" + b"\xff\x1f\2\0"


def huge_disk() -> bytes:
    foot = SectionFooter(9).encode()
    chunk = DiskChunk("disk", (1 << 54) - 2048, None).encode()
    return SectionStart(9, "block", 0, 1).encode() + chunk + DiskEnd().encode() + foot


BROKEN: dict[str, tuple[bytes, type[VmferryError], str]] = {
    "type byte": (RUNNING + b"\x42", StreamError, "the type byte 0x42"),
    "unknown section": (RUNNING + b"\2\0\0\0\x63", StreamError, "section that was started"),
    "wrong footer": (RUNNING[:-1] + b"\x63", StreamError, "the footer 7e 00 00 00 02"),
    "second list of blocks": (RUNNING + part(BLOCKS.encode()), StreamError, "one list of RAM"),
    "end before memory": (OPEN + b"\0", StreamError, "guest memory before"),
    "device before memory": (OPEN + devices()[:20], StreamError, "guest memory before"),
    "page before memory": (OPEN + part(page(1, 1)), StreamError, "section that was started"),
    "page outside": (RUNNING + part(page(64, 1))[:30], StreamError, "a page below 0x40000"),
    "xbzrle that overruns": (RUNNING + part(XBZRLE_OVERRUN), StreamError, "runs fit"),
    "disk of 8 EiB": (OPEN + huge_disk(), LimitExceeded, "bytes of disks"),
    "postcopy by discard": (ADVISED + DISCARD, PeerError, "switched to postcopy"),
    "postcopy by package": (ADVISED + PACKAGE, PeerError, "switched to postcopy"),
    "postcopy not announced": (RUNNING + DISCARD, StreamError, "postcopy announced"),
    "postcopy resumed": (OPEN + PostcopyResume().encode(), VmferryError, "postcopy"),
    "bitmap asked for": (OPEN + ReceivedBitmap("pc.ram").encode(), VmferryError, "postcopy"),
    "colo": (OPEN + EnableColo().encode(), PeerError, "turn x-colo off"),
    "flush without channels": (
        head(NEW, return_path=True) + start(RamFlush().encode()),
        StreamError,
        "multifd channels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refused_source_hears_so_at_once_and_nothing_is_left(name: str) -> None:
    stream, kind, words = BROKEN[name]
    with Attempt() as attempt:
        peer = attempt.connect(stream)
        with decided_soon():
            assert peer.verdict() == 1
            error = attempt.error(kind)
        assert words in str(error)
        if isinstance(error, StreamError):
            assert error.place.channel == "main"
            assert error.place.offset is not None
            assert error.place.offset <= len(stream)


def test_error_of_a_page_names_its_place() -> None:
    with Attempt() as attempt:
        attempt.connect(RUNNING + part(XBZRLE_OVERRUN)).verdict()
        place = attempt.error(StreamError).place
        assert (place.channel, place.section, place.block) == ("main", "ram", "pc.ram")
        assert place.offset == len(RUNNING) + 5 + 11


@pytest.mark.parametrize("name", ["type byte", "postcopy by discard"])
def test_refused_source_that_never_stops_sending_is_cut_off(name: str) -> None:
    stream, kind, _ = BROKEN[name]
    with Attempt() as attempt:
        peer = attempt.connect(stream)

        def flood() -> None:
            while True:
                peer.say(fill(1, 64))

        flooding = background(flood)
        with decided_soon():
            attempt.error(kind)
        with pytest.raises(TransportError):
            flooding.result(PROMPT)
        assert peer.verdict() == 1


def ask_without_listening(peer: Peer) -> None:
    """Until the answers fill every buffer, so that no verdict finds room there."""
    while True:
        peer.say(Ping(1).encode() * 1000)


def test_refused_source_that_does_not_listen_is_cut_off() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(OPEN, start())
        asking = blocked(lambda: ask_without_listening(peer))
        with decided_soon():
            attempt.destination.cancel()
            attempt.error(ChannelClosed)
        with pytest.raises(TransportError):
            asking.result(PROMPT)


def test_answer_that_is_not_taken_has_a_deadline() -> None:
    deadlines = Deadlines(connect=PROMPT, first=PROMPT, idle=0.3)
    with Attempt(deadlines=deadlines) as attempt:
        peer = attempt.connect(OPEN, start())
        asking = background(lambda: ask_without_listening(peer))
        assert "waited 300 ms" in str(attempt.error(TransportError))
        with pytest.raises(TransportError):
            asking.result(PROMPT)


@pytest.mark.parametrize("size", [3, 20, len(OPEN), len(OPEN) + 30, len(RUNNING)])
def test_source_that_closes_early_is_a_truncated_stream(size: int) -> None:
    with Attempt() as attempt:
        peer = attempt.connect(RUNNING[:size])
        peer.end()
        with decided_soon():
            assert peer.verdict() == (1 if size >= len(OPEN) else None)
            attempt.error(TruncatedStream)


def test_source_that_resets_the_connection_is_an_error_of_the_network() -> None:
    with Attempt(uri="tcp:127.0.0.1:0") as attempt:
        peer = attempt.connect(RUNNING)
        wait_until(lambda: peer.channel.unsent() == 0)
        peer.close()  # with answers unread
        attempt.error(VmferryError)


@pytest.mark.parametrize("uri", ["unix", "tcp:127.0.0.1:0"])
def test_verdict_reaches_a_source_that_was_still_sending(uri: str) -> None:
    with Attempt(uri=uri) as attempt:
        peer = attempt.connect(RUNNING + b"\x42" + fill(1, 200))
        assert peer.verdict() == 1
        attempt.error(StreamError)


def test_source_without_return_path_hears_nothing_but_the_end() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(head(), start(), b"\x42")
        with decided_soon():
            peer.ends()
            attempt.error(StreamError)
        assert peer.answers() == []


def test_ping_without_a_return_path_is_refused() -> None:
    with Attempt() as attempt:
        attempt.connect(head(), Ping(1).encode()).ends()
        attempt.error(VmferryError)


def test_return_path_over_a_one_way_transport_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stream").write_bytes(plain(return_path=True))
    with Attempt(uri=f"file:{tmp_path}/stream") as attempt:
        assert "cannot carry" in str(attempt.error(PeerError))


@pytest.mark.parametrize(
    ("stream", "deadlines", "words"),
    [
        (b"", Deadlines(connect=0.05), "waited 50 ms for a connection"),
        (b"QE", Deadlines(connect=PROMPT, first=0.05), "waited"),
        (RUNNING, Deadlines(connect=PROMPT, first=PROMPT, idle=0.05), "waited 50 ms for data"),
    ],
    ids=["never connects", "never says who it is", "falls silent"],
)
def test_silence_has_a_deadline(stream: bytes, deadlines: Deadlines, words: str) -> None:
    with Attempt(deadlines=deadlines) as attempt:
        peer = attempt.connect(stream) if stream else None
        assert words in str(attempt.error(TransportError))
        if peer is not None:
            assert peer.verdict() == (1 if stream == RUNNING else None)


def test_cancelled_destination_tells_its_source() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(RUNNING)
        peer.await_answer(Pong(1))  # what was received may not yet be understood
        with decided_soon():
            attempt.destination.cancel()
            assert peer.verdict() == 1
            attempt.error(ChannelClosed)


def test_cancelled_before_anyone_connected_it_ends_at_once() -> None:
    with Attempt() as attempt, decided_soon():
        attempt.destination.cancel()
        attempt.error(ChannelClosed)


def interrupt_at(phase: str):
    def report(progress: Progress) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("phase", ["active", "storing"])
def test_interrupted_in_the_middle_it_leaves_nothing(phase: str) -> None:
    with Attempt(progress=interrupt_at(phase)) as attempt:
        peer = attempt.connect(plain(page(1, 7), return_path=True))
        assert peer.verdict() == 1
        attempt.error(KeyboardInterrupt)


def test_progress_that_fails_fails_the_migration() -> None:
    def report(progress: Progress) -> None:
        raise ZeroDivisionError(progress.phase)

    with Attempt(progress=report) as attempt:
        peer = attempt.connect(plain(page(1, 7), return_path=True))
        assert peer.verdict() == 1
        attempt.error(ZeroDivisionError)


def test_block_that_no_file_can_hold_is_told_to_the_source() -> None:
    blocks = RamBlocks((RamBlock("huge", 1 << 62),))
    with Attempt(max_ram=1 << 62) as attempt:
        peer = attempt.connect(OPEN, start(blocks=blocks))
        assert peer.verdict() == 1
        assert "cannot be created: File too large" in str(attempt.error(StorageError))


def test_memory_above_the_limit_is_refused() -> None:
    with Attempt(max_ram=RAM.length) as attempt:
        assert attempt.connect(OPEN, start()).verdict() == 1
        assert "--max-ram" in str(attempt.error(LimitExceeded))


def test_process_takes_the_next_attempt_after_each_failure(tmp_path: Path) -> None:
    for stream, _, _ in BROKEN.values():
        with Attempt(tmp_path / "checkpoint") as attempt:
            attempt.connect(stream).end()
            attempt.error()
    with Attempt(tmp_path / "checkpoint") as attempt:
        assert attempt.connect(plain(return_path=True)).verdict() == 0
        attempt.checkpoint()


def test_success_that_cannot_be_told_says_that_the_machine_is_saved() -> None:
    def report(progress: Progress) -> None:
        if progress.phase == "storing":
            peer.close()

    with Attempt(progress=report) as attempt:
        peer = attempt.connect()
        peer.say(plain(page(1, 7), return_path=True))
        error = attempt.raised(TransportError)
        assert "the machine is saved, but its source does not know it" in str(error)
        Checkpoint(attempt.directory, verify=True).close()


def test_two_main_channels_are_refused() -> None:
    with Attempt() as attempt:
        first = attempt.connect(OPEN)
        second = attempt.connect(OPEN)
        first.say(start())
        with decided_soon():
            assert first.verdict() == 1
            second.ends()
            assert "a multifd channel with magic" in str(attempt.error(StreamError))


def test_answers_are_pongs_and_then_the_verdict() -> None:
    with Attempt() as attempt:
        peer = attempt.connect(OPEN, OpenReturnPath().encode(), Ping(9).encode(), b"\x42")
        assert peer.answers() == [Pong(1), Pong(9), Shut(1)]
        peer.close()
        attempt.error(StreamError)


def test_silent_connection_holds_up_no_other() -> None:
    with Attempt() as attempt:
        silent = attempt.connect()
        with decided_soon():
            attempt.connect(b"not a migration stream").ends()
            silent.ends()
            attempt.error(StreamError)


def test_whole_stream_behind_a_silent_connection_is_not_received_without_it() -> None:
    deadlines = Deadlines(connect=PROMPT, first=0.2, idle=PROMPT)
    with Attempt(deadlines=deadlines) as attempt:
        attempt.connect()
        peer = attempt.connect(plain(return_path=True))
        assert peer.verdict() == 1
        attempt.error(TransportError)


def test_channel_waits_for_no_main_channel_longer_than_for_its_first_bytes() -> None:
    with Attempt(deadlines=Deadlines(first=0.1)) as attempt:
        attempt.connect(hello(0), sync()).ends()
        assert "waited 100 ms for a connection" in str(attempt.error(TransportError))


def test_name_of_a_block_that_no_file_can_have_is_no_trouble() -> None:
    blocks = RamBlocks((RamBlock("../../" + "é" * 120, PAGE_SIZE), RamBlock("..", PAGE_SIZE)))
    name = encode_name("..")
    record = (8).to_bytes(8) + name + fill(3)
    with Attempt() as attempt:
        peer = attempt.connect(OPEN, start(blocks=blocks), part(record), end(), devices())
        assert peer.verdict() == 0
        attempt.checkpoint().verify()
