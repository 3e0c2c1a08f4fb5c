"""A destination against a scripted source: channels in any order, in step, broken in any way."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest

import vmferry
from tests.pages.twins import PAGE, ZERO, record
from tests.support.recorded import recorded
from tests.wire.streams import BLOCKS, CONFIGURATION, END, HEADER, K, end, join, part, start
from tests.wire.streams import TAIL as DEVICES
from vmferry.wire.commands import EnableColo, OpenReturnPath, Ping
from vmferry.wire.configuration import Configuration
from vmferry.wire.multifd import Hello, encode_header
from vmferry.wire.ram import RamFlush
from vmferry.wire.return_path import Pong, Shut, SwitchoverAck

NOBODY = UUID(int=0)
QUICK = vmferry.Deadlines(connect=5, first=0.5, idle=0.5)
RETURN_PATH = join(OpenReturnPath(), Ping(1))
OLD, NEW = b"old!" * (K // 4), b"new!" * (K // 4)
A, _ = BLOCKS.blocks


class Attempt:
    """One ``receive`` in a thread, and the connections of a source to it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory / "vm"
        self._path = directory / "socket"
        self._stack = stack
        self.error: BaseException | None = None
        listening = threading.Event()

        def run() -> None:
            try:
                vmferry.receive(
                    f"unix:{self._path}",
                    self.directory,
                    deadlines=QUICK,
                    started=lambda _: listening.set(),
                ).close()
            except vmferry.VmferryError as error:
                self.error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()
        assert listening.wait(5)

    def connect(self, data: bytes = b"", *, close: bool = False) -> socket.socket:
        """One more connection, over which *data* is sent at once."""
        connection = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(5)
        connection.connect(str(self._path))
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return connection

    def finish(self) -> BaseException | None:
        """Wait for the end; the error, if it failed."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.error

    def ram(self) -> bytes:
        """Block ``a`` of the checkpoint."""
        with vmferry.Checkpoint(self.directory, verify=True) as checkpoint:
            return (self.directory / checkpoint.manifest.ram[0].file).read_bytes()


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Callable[[], Attempt]]:
    """Starts attempts; afterwards no thread and no descriptor of theirs is left."""
    threads, files = set(threading.enumerate()), _open_files()
    with ExitStack() as stack:
        numbers = itertools.count()

        def begin() -> Attempt:
            (directory := tmp_path / str(next(numbers))).mkdir()
            return Attempt(directory, stack)

        yield begin
    assert set(threading.enumerate()) <= threads
    assert _open_files() <= files


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def answers(connection: socket.socket) -> bytes:
    """Everything that the destination says until it closes."""
    said = b""
    try:
        while data := connection.recv(1000):
            said += data
    except ConnectionError:
        pass
    return said


def packet(*pages: int, data: bytes = b"", sync: bool = False) -> bytes:
    """A multifd packet with *pages* of block ``a``, each filled with *data*."""
    offsets = np.array([page * K for page in pages], np.uint64)
    payload = data * len(pages)
    header = encode_header(
        A if pages else None, offsets, payload_size=len(payload), number=0, page_size=K, sync=sync
    )
    return header + payload


SYNC = packet(sync=True)


def hello(number: int) -> bytes:
    return Hello(NOBODY, number).encode()


def main(*rounds: bytes, return_path: bool = True, flush: bool = False) -> bytes:
    """A main channel whose parts hold *rounds*; each body ends with a synchronisation."""
    last = join(RamFlush(), END) if flush else END
    opening = RETURN_PATH if return_path else b""
    parts = [part(2, records, last) for records in rounds]
    return join(
        HEADER, CONFIGURATION, opening, start(2, BLOCKS, last), *parts, end(2, last), DEVICES
    )


def zero(page: int) -> bytes:
    return record(ZERO, page * K, b"\0", b"\1a")


def test_the_source_hears_one_pong_and_one_success(attempt: Callable[[], Attempt]) -> None:
    receiving = attempt()
    said = answers(receiving.connect(main(zero(0))))
    assert receiving.finish() is None
    assert said == join(Pong(1), Shut(0))


@pytest.mark.parametrize(
    ("machine", "acknowledged"), [("board-8.0", False), ("board-8.1", True), ("board", False)]
)
def test_a_switchover_is_acknowledged_to_sources_that_may_wait_for_it(
    attempt: Callable[[], Attempt], machine: str, acknowledged: bool
) -> None:
    receiving = attempt()
    other = Configuration(machine, page_bits=10).encode()
    said = answers(receiving.connect(main(zero(0)).replace(CONFIGURATION, other)))
    assert receiving.finish() is None
    assert said.startswith(SwitchoverAck().encode()) == acknowledged


@pytest.mark.parametrize("order", list(itertools.permutations(["main", "0", "1"])))
@pytest.mark.parametrize("flush", [False, True])
def test_channels_may_connect_in_any_order(
    attempt: Callable[[], Attempt], order: tuple[str, ...], flush: bool
) -> None:
    receiving = attempt()
    data = {
        "main": main(zero(0), zero(3), flush=flush),
        "0": hello(0) + SYNC + packet(1, data=NEW) + SYNC * 3,
        "1": hello(1) + SYNC * 2 + packet(2, data=NEW, sync=True) + packet() + SYNC,
    }
    if order[-1] == "main":
        connections = [receiving.connect(data[name]) for name in order]
    else:
        # What stands behind the main channel's first synchronisation waits for all channels.
        connections = [receiving.connect(data[name][:4]) for name in order]
        for name, connection in zip(order, connections, strict=True):
            connection.sendall(data[name][4:])
    said = answers(connections[order.index("main")])
    assert receiving.finish() is None
    assert said == join(Pong(1), Shut(0))
    assert receiving.ram() == bytes(K) + NEW + NEW + bytes(K)


@pytest.mark.parametrize("first", ["main", "channel"])
def test_a_page_that_became_zero_later_stays_zero(
    attempt: Callable[[], Attempt], first: str
) -> None:
    receiving = attempt()
    channel = hello(0) + SYNC + packet(0, data=OLD) + SYNC * 3
    stream = main(b"", zero(0))
    _run_in_order(receiving, stream, channel, first)
    assert receiving.finish() is None
    assert receiving.ram() == bytes(4 * K)


@pytest.mark.parametrize("first", ["main", "channel"])
def test_a_page_that_was_zero_before_keeps_what_came_later(
    attempt: Callable[[], Attempt], first: str
) -> None:
    receiving = attempt()
    channel = hello(0) + SYNC * 2 + packet(0, data=NEW) + SYNC * 2
    stream = main(zero(0), b"")
    _run_in_order(receiving, stream, channel, first)
    assert receiving.finish() is None
    assert receiving.ram() == NEW + bytes(3 * K)


def _run_in_order(receiving: Attempt, stream: bytes, channel: bytes, first: str) -> None:
    """Send one of the two whole before more than the magic of the other."""
    source, pages = receiving.connect(stream[:4]), receiving.connect(channel[:4])
    if first == "main":
        source.sendall(stream[4:])
        pages.sendall(channel[4:])
    else:
        pages.sendall(channel[4:])
        source.sendall(stream[4:])
    assert answers(source) == join(Pong(1), Shut(0))


BROKEN_CHANNELS = [
    pytest.param(hello(0) + SYNC, "channel 0 again", id="a number taken twice"),
    pytest.param(b"junk" * 20, "multifd channel with magic 11223344", id="junk"),
    pytest.param(hello(1) + b"junk" * 400, "packet with magic", id="junk for a packet"),
    pytest.param(hello(1) + packet(4, data=NEW) + SYNC, "offsets of pages", id="a page too far"),
    pytest.param(hello(1) + SYNC[:99], "header of a packet", id="cut inside a packet"),
    pytest.param(hello(1), "closed multifd channel 1 before", id="never in step"),
    pytest.param(hello(1)[:9], "an initial packet", id="cut inside the first packet"),
    pytest.param(b"", "found its end", id="closed before a byte"),
]


@pytest.mark.parametrize(("data", "message"), BROKEN_CHANNELS)
def test_a_broken_channel_breaks_the_migration_and_the_source_hears_it(
    attempt: Callable[[], Attempt], data: bytes, message: str
) -> None:
    receiving = attempt()
    stream = main(zero(0))
    source = receiving.connect(stream[:20])
    receiving.connect(hello(0) + SYNC * 3)
    receiving.connect(data, close=True)
    source.sendall(stream[20:])
    said = answers(source)
    error = receiving.finish()
    assert isinstance(error, vmferry.StreamError | vmferry.TransportError | vmferry.PeerError)
    assert message in str(error)
    assert said == join(Pong(1), Shut(1))
    assert not receiving.directory.exists()


BROKEN_STREAMS = [
    pytest.param(main(b"\xff" * 8), vmferry.StreamError, "record of guest memory", id="junk"),
    pytest.param(main(zero(9)), vmferry.StreamError, "page below", id="a page too far"),
    pytest.param(
        main(b"")[:-40], vmferry.TransportError, "waited 500 ms", id="silence before the end"
    ),
    pytest.param(
        join(HEADER, CONFIGURATION, RETURN_PATH, EnableColo()),
        vmferry.PeerError,
        "COLO",
        id="fault tolerance",
    ),
    pytest.param(
        join(HEADER, CONFIGURATION, RETURN_PATH, b"\0"),
        vmferry.StreamError,
        "guest memory before",
        id="no memory",
    ),
]


@pytest.mark.parametrize(("stream", "kind", "message"), BROKEN_STREAMS)
def test_a_broken_stream_is_refused_and_nothing_stays(
    attempt: Callable[[], Attempt],
    stream: bytes,
    kind: type[vmferry.VmferryError],
    message: str,
) -> None:
    receiving = attempt()
    said = answers(receiving.connect(stream))
    error = receiving.finish()
    assert isinstance(error, kind)
    assert message in str(error)
    assert said == join(Pong(1), Shut(1))
    assert not receiving.directory.exists()


def test_a_description_that_does_not_fit_is_refused_without_waiting_for_more(
    attempt: Callable[[], Attempt],
) -> None:
    receiving = attempt()
    stream = main(zero(0))
    said = answers(receiving.connect(stream.replace(b'"name": "timer"', b'"name": "tired"')))
    assert isinstance(receiving.finish(), vmferry.StreamError)
    assert said == join(Pong(1), Shut(1))


def test_a_source_that_closes_early_is_an_error(attempt: Callable[[], Attempt]) -> None:
    receiving = attempt()
    receiving.connect(main(zero(0))[:200], close=True)
    assert isinstance(receiving.finish(), vmferry.TruncatedStream)
    assert not receiving.directory.exists()


def test_one_byte_at_a_time_is_as_good_as_all_at_once(attempt: Callable[[], Attempt]) -> None:
    receiving = attempt()
    source = receiving.connect()
    for byte in main(record(PAGE, 0, NEW, b"\1a")):
        source.sendall(bytes([byte]))
    assert answers(source) == join(Pong(1), Shut(0))
    assert receiving.finish() is None
    assert receiving.ram() == NEW + bytes(3 * K)


def test_bytes_behind_the_end_are_refused(attempt: Callable[[], Attempt]) -> None:
    receiving = attempt()
    receiving.connect(main(zero(0), return_path=False) + b"more", close=True)
    error = receiving.finish()
    assert isinstance(error, vmferry.StreamError)
    assert "behind the end of the stream" in str(error)
    assert not receiving.directory.exists()


def test_after_a_failure_the_next_attempt_succeeds(attempt: Callable[[], Attempt]) -> None:
    failing = attempt()
    answers(failing.connect(main(b"\xff" * 8)))
    assert failing.finish() is not None
    receiving = attempt()
    answers(receiving.connect(main(zero(0))))
    assert receiving.finish() is None


def test_a_section_that_cannot_be_kept_is_refused_before_anything_is_lost(
    attempt: Callable[[], Attempt],
) -> None:
    receiving = attempt()
    receiving.connect(bytes(recorded("ppc64-pseries")[0].sent[:1000]), close=True)
    error = receiving.finish()
    assert isinstance(error, vmferry.PeerError)
    assert "spapr/htab" in str(error)
    assert not receiving.directory.exists()
