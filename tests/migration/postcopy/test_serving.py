"""What a source of a machine at rest does for a destination that behaves, and for others."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import pytest

from tests.migration.machines import PAGE_SIZE, Memory, Resting, noise
from tests.transports.support import PROMPT, background, wait_until
from vmferry.errors import ChannelClosed, PeerError, PeerSilent, Refused, StreamError, VmferryError
from vmferry.migration.postcopy import server as postcopy_server
from vmferry.migration.postcopy.left import Block
from vmferry.migration.postcopy.server import MemoryServer, RamFormat, Service
from vmferry.migration.postcopy.source import LazyOptions, LazySource, Paused
from vmferry.migration.progress import Meter
from vmferry.transports import RateLimit, connect
from vmferry.wire.commands import Package, PostcopyRun
from vmferry.wire.ram import RamBlock, RamPages
from vmferry.wire.reader import StreamReader, Tolerate
from vmferry.wire.return_path import Message, Pong, RequestPages, Shut
from vmferry.wire.sections import EndOfStream

PAGES = 600
CONTENT = noise(5, PAGES * PAGE_SIZE)


class LazyMemory(Memory):
    def data_from(self, offset: int) -> tuple[int, int] | None:
        end = PAGE_SIZE * len(self.sums)
        return (offset, end) if offset < end else None


@dataclass(frozen=True, kw_only=True)
class LazyResting(Resting):
    def memory(self, block: object) -> LazyMemory:  # noqa: ARG002 - it has only one
        return LazyMemory(CONTENT, PAGE_SIZE)


MACHINE = LazyResting(memories={"pc.ram": CONTENT})


@dataclass(slots=True)
class Fetching:
    """A destination that reads what comes, in a thread, and says what it is told to."""

    connection: socket.socket
    places: list[int] = field(default_factory=list)
    kinds: set[type] = field(default_factory=set)

    def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            data = message if isinstance(message, bytes) else message.encode()
            self.connection.sendall(data)

    def read(self) -> None:
        """Until the end of the stream, or of the connection."""
        reader = StreamReader(tolerate=Tolerate.NO_END)
        try:
            while data := self.connection.recv(1 << 16):
                for event in reader.feed(data):
                    self.kinds.add(type(event))
                    if isinstance(event, RamPages):
                        self.places += event.offsets.tolist()
        except OSError:
            pass

    def start(self) -> Self:
        """Read in the background until the machine runs."""
        background(self.read)
        wait_until(lambda: PostcopyRun in self.kinds or Package in self.kinds)
        return self


@contextmanager
def serving(tmp_path: Path, **options: Any) -> Iterator[tuple[Fetching, LazySource, Future[None]]]:
    """A source of :data:`MACHINE` in a thread, and its destination."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        source = LazySource(
            MACHINE,
            lambda given_up: connect(f"unix:{tmp_path}/socket", given_up=given_up),
            options=replace(LazyOptions(idle=PROMPT, answer=PROMPT), **options),
        )
        running = background(source.run)
        connection, _ = listener.accept()
        with connection:
            yield Fetching(connection), source, running
        assert running.exception(PROMPT) is None or isinstance(
            running.exception(PROMPT), VmferryError
        )


LOADED = Pong(3)
SHORT = 0.3


@contextmanager
def served(tmp_path: Path) -> Iterator[tuple[Fetching, MemoryServer]]:
    """A server of some pages that has begun, and its destination."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(1)
        with connect(f"unix:{tmp_path}/socket") as channel:
            connection, _ = listener.accept()
            server = MemoryServer(
                [
                    Block(
                        RamBlock("pc.ram", 8 * PAGE_SIZE),
                        LazyMemory(CONTENT[: 8 * PAGE_SIZE], PAGE_SIZE),
                        PAGE_SIZE,
                    )
                ],
                RamFormat(1, PAGE_SIZE, footers=True),
                idle=PROMPT,
                answer=SHORT,
                limit=RateLimit(None),
                meter=Meter(),
                service=Service(),
            )
            server.attach(channel)
            server.begin()
            with connection:
                yield Fetching(connection), server


def ask(page: int, count: int = 1, block: str | None = "pc.ram") -> RequestPages:
    return RequestPages(page * PAGE_SIZE, count * PAGE_SIZE, block)


def test_each_page_comes_once_and_what_is_asked_for_first(tmp_path: Path) -> None:
    with serving(tmp_path) as (peer, source, running):
        peer.start()
        peer.say(ask(500), ask(100, block=None))
        wait_until(lambda: len(peer.places) == 2)
        assert peer.places == [500 * PAGE_SIZE, 100 * PAGE_SIZE]
        peer.say(LOADED)
        wait_until(lambda: EndOfStream in peer.kinds)
        peer.say(Shut(0))
        running.result(PROMPT)
        assert sorted(peer.places) == list(range(0, len(CONTENT), PAGE_SIZE))
        assert source.service.requests == 2


def test_no_limit_of_the_background_keeps_a_guest_waiting(tmp_path: Path) -> None:
    """At 1 byte a second all is there in a month, and what is asked for at once."""
    with serving(tmp_path, bandwidth=1.0) as (peer, source, running):
        peer.start()
        peer.say(LOADED)
        wait_until(lambda: len(peer.places) > 0)
        for page in range(300, 330):
            peer.say(ask(page))
        wait_until(lambda: set(range(300, 330)) <= {place // PAGE_SIZE for place in peer.places})
        assert len(peer.places) < PAGES
        source.cancel()
        assert isinstance(running.exception(PROMPT), Paused)


def test_machine_that_asks_now_and_then_is_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that goes over its memory is followed at once."""
    for name in ("_QUIET", "_AT_MOST", "_DENSE"):
        monkeypatch.setattr(postcopy_server, name, PROMPT)
    with serving(tmp_path) as (peer, source, running):
        peer.start()
        peer.say(LOADED)
        asked = list(range(300, 300 + postcopy_server._MANY - 1))
        for page in asked:
            peer.say(ask(page))
        wait_until(lambda: len(peer.places) == len(asked))
        assert sorted(peer.places) == [page * PAGE_SIZE for page in asked]
        peer.say(ask(7))
        wait_until(lambda: EndOfStream in peer.kinds)
        peer.say(Shut(0))
        running.result(PROMPT)
        assert source.service.requests == len(asked) + 1


NONSENSE = {
    "beyond the block": ask(PAGES),
    "across its end": ask(PAGES - 1, 2),
    "another block": ask(0, block="pc.bios"),
    "not a page": RequestPages(7, PAGE_SIZE, "pc.ram"),
    "part of a page": RequestPages(0, 512, "pc.ram"),
    "no block yet": ask(0, block=None),
    "nothing": b"\0\4\0\x0c" + bytes(12),
    "unknown message": b"\0\x63\0\0",
    "a length that is none": b"\0\1\0\7" + bytes(7),
    "far beyond": RequestPages((1 << 64) - PAGE_SIZE, PAGE_SIZE - 1, "pc.ram"),
}


@pytest.mark.parametrize("what", NONSENSE)
@pytest.mark.parametrize("runs", [False, True], ids=["loading", "running"])
def test_senseless_request_ends_the_restore(tmp_path: Path, what: str, runs: bool) -> None:
    with serving(tmp_path, bandwidth=1.0) as (peer, _, running):
        peer.start()
        if runs:
            peer.say(LOADED)
            wait_until(lambda: len(peer.places) > 0)
        peer.say(NONSENSE[what])
        with pytest.raises(StreamError):
            running.result(PROMPT)


def test_flood_of_requests_is_bounded(tmp_path: Path) -> None:
    """A destination that asks for the same again and again is sent each page once."""
    with serving(tmp_path) as (peer, source, running):
        peer.start()
        again = b"".join(ask(page % PAGES).encode() for page in range(20 * PAGES))
        peer.say(again, LOADED)
        wait_until(lambda: EndOfStream in peer.kinds)
        peer.say(Shut(0))
        running.result(PROMPT)
        assert len(peer.places) == PAGES
        assert len(source.service.asked) <= 2 * PAGES


def test_what_is_kept_of_requests_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine of any size may ask for every page of it."""
    monkeypatch.setattr(postcopy_server, "MOST_ASKED", 100)
    with serving(tmp_path, bandwidth=1.0) as (peer, source, running):
        peer.start()
        for page in range(PAGES):
            peer.say(ask(page))
        peer.say(LOADED)
        wait_until(lambda: EndOfStream in peer.kinds)
        peer.say(Shut(0))
        running.result(PROMPT)
        assert list(source.service.asked[1:200:2]) == list(range(100))
        assert len(source.service.asked) == 200


def test_destination_that_asks_on_and_on_and_does_not_load(tmp_path: Path) -> None:
    """The machine stands still meanwhile: no request moves the deadline."""
    with serving(tmp_path, answer=SHORT) as (peer, _, running):
        peer.start()
        with suppress(OSError):
            while not running.done():
                peer.say(ask(7))
                time.sleep(0.01)
        with pytest.raises(PeerSilent, match="load the devices"):
            running.result(PROMPT)


def test_destination_that_says_other_things_at_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, answer=SHORT) as (peer, _, running):
        peer.start()
        peer.say(LOADED)
        wait_until(lambda: EndOfStream in peer.kinds)
        with suppress(OSError):
            while not running.done():
                peer.say(Pong(7))
        with pytest.raises(Paused, match="answer"):
            running.result(PROMPT)


@pytest.mark.parametrize("word", ["await_ready", "await_taken"])
def test_destination_that_has_all_memory_and_does_not_say_the_word(
    tmp_path: Path, word: str
) -> None:
    with served(tmp_path) as (peer, server):
        waiting = background(getattr(server, word))
        background(lambda: peer.connection.recv(1 << 20))
        with pytest.raises(PeerSilent, match="did not say so"):
            waiting.result(PROMPT)


def test_destination_that_gives_up_is_a_refusal(tmp_path: Path) -> None:
    with serving(tmp_path) as (peer, _, running):
        peer.start()
        peer.say(Shut(1))
        with pytest.raises(Refused):
            running.result(PROMPT)


def test_destination_that_goes_before_it_runs_has_nothing(tmp_path: Path) -> None:
    with serving(tmp_path) as (peer, _, running):
        peer.start()
        peer.connection.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PeerError, match="before it ran the machine"):
            running.result(PROMPT)


def test_destination_that_goes_while_it_runs_pauses(tmp_path: Path) -> None:
    with serving(tmp_path, bandwidth=1.0) as (peer, _, running):
        peer.start()
        peer.say(LOADED)
        wait_until(lambda: len(peer.places) > 0)
        peer.connection.shutdown(socket.SHUT_RDWR)
        with pytest.raises(Paused, match="resume"):
            running.result(PROMPT)


def test_cancel_before_it_runs(tmp_path: Path) -> None:
    with serving(tmp_path) as (peer, source, running):
        peer.start()
        source.cancel()
        with pytest.raises(ChannelClosed):
            running.result(PROMPT)
