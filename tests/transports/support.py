"""Pairs of channels over every transport, and what tests do with them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest

from vmferry.transports import (
    Channel,
    RateLimit,
    ReadAhead,
    connect,
    limited,
    listen,
    memory_pair,
)

T = TypeVar("T")
Pair = tuple[Channel, Channel]
PROMPT = 5.0
"""Seconds within which whatever is prompt happens even on a busy machine."""

# A process that copies its standard input to its standard output.
COPIER = """
from vmferry.transports import connect, listen
with listen("-") as listener, listener.accept() as source, connect("-") as sink:
    print("not part of the stream")
    buffer = memoryview(bytearray(65536))
    while count := source.recv_into(buffer):
        sink.send([buffer[:count]])
    sink.end_of_data()
"""


def noise(seed: int, count: int) -> bytes:
    """*count* bytes that no two places of a stream have in common, the same every time."""
    return random.Random(seed).randbytes(count)  # noqa: S311 - nothing secret


def background(work: Callable[[], T]) -> Future[T]:
    """Start *work* in a thread; ``result(PROMPT)`` gives its value or raises its error."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed on whatever it is
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_until(condition: Callable[[], bool], seconds: float = PROMPT) -> None:
    """Return as soon as *condition* holds; fail if it does not become true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.002)


def is_blocked(thread_id: int) -> bool:
    """Whether a thread of this process sleeps in the kernel."""
    status = Path(f"/proc/self/task/{thread_id}/stat").read_text()
    return status.rpartition(")")[2].split()[0] == "S"


def blocked(work: Callable[[], T]) -> Future[T]:
    """Start *work* in a thread, and return when it has come to rest in a blocking call."""
    identity: list[int] = []

    def run() -> T:
        identity.append(threading.get_native_id())
        return work()

    future = background(run)
    rests = 0

    def at_rest() -> bool:
        nonlocal rests
        rests = rests + 1 if identity and not future.done() and is_blocked(identity[0]) else 0
        return rests > 20 or future.done()

    wait_until(at_rest)
    return future


def receive(channel: Channel, count: int | None = None, step: int = 65536) -> bytes:
    """*count* bytes, or all until the end of the stream."""
    data = bytearray()
    buffer = memoryview(bytearray(step))
    while count is None or len(data) < count:
        room = step if count is None else min(step, count - len(data))
        got = channel.recv_into(buffer[:room], PROMPT)
        if not got:
            break
        data += buffer[:got]
    return bytes(data)


@contextlib.contextmanager
def socket_pair(uri: str) -> Iterator[Pair]:
    with (
        listen(uri) as listener,
        connect(listener.address) as sender,
        accepted(listener.accept(PROMPT)) as receiver,
    ):
        yield sender, receiver


def accepted(channel: Channel | None) -> Channel:
    assert channel is not None
    return channel


@contextlib.contextmanager
def tcp4(_path: Path) -> Iterator[Pair]:
    with socket_pair("tcp:127.0.0.1:0") as pair:
        yield pair


def need_ipv6() -> None:
    """Skip the test where the machine has no IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"this machine has no IPv6: {error}")


@contextlib.contextmanager
def tcp6(_path: Path) -> Iterator[Pair]:
    need_ipv6()
    with socket_pair("tcp:[::1]:0") as pair:
        yield pair


@contextlib.contextmanager
def unix(path: Path) -> Iterator[Pair]:
    with socket_pair(f"unix:{path}/socket") as pair:
        yield pair


@contextlib.contextmanager
def fd_socket(_path: Path) -> Iterator[Pair]:
    one, two = socket.socketpair()
    with (
        connect(f"fd:{one.detach()}") as sender,
        listen(f"fd:{two.detach()}") as listener,
        accepted(listener.accept()) as receiver,
    ):
        yield sender, receiver


@contextlib.contextmanager
def memory(_path: Path) -> Iterator[Pair]:
    sender, receiver = memory_pair()
    with sender, receiver:
        yield sender, receiver


@contextlib.contextmanager
def limited_memory(_path: Path) -> Iterator[Pair]:
    sender, receiver = memory_pair()
    with limited(sender, RateLimit(1 << 30)) as slow, receiver:
        yield slow, receiver


@contextlib.contextmanager
def unix_read_ahead(path: Path) -> Iterator[Pair]:
    with unix(path) as (sender, receiver), ReadAhead(receiver) as ahead:
        yield sender, ahead


@contextlib.contextmanager
def fd_pipe(_path: Path) -> Iterator[Pair]:
    readable, writable = os.pipe()
    with (
        connect(f"fd:{writable}") as sender,
        listen(f"fd:{readable}") as listener,
        accepted(listener.accept()) as receiver,
    ):
        yield sender, receiver


@contextlib.contextmanager
def pipe_read_ahead(path: Path) -> Iterator[Pair]:
    with fd_pipe(path) as (sender, receiver), ReadAhead(receiver) as ahead:
        yield sender, ahead


@contextlib.contextmanager
def exec_sender(path: Path) -> Iterator[Pair]:
    os.mkfifo(path / "fifo")
    with connect(f"exec:cat >{path}/fifo") as sender:
        readable = os.open(path / "fifo", os.O_RDONLY)  # waits until the command runs
        with listen(f"fd:{readable}") as listener, accepted(listener.accept()) as receiver:
            yield sender, receiver


@contextlib.contextmanager
def exec_receiver(path: Path) -> Iterator[Pair]:
    os.mkfifo(path / "fifo")
    with listen(f"exec:cat {path}/fifo") as listener, accepted(listener.accept()) as receiver:
        writable = os.open(path / "fifo", os.O_WRONLY)  # waits until the command runs
        with connect(f"fd:{writable}") as sender:
            yield sender, receiver


@contextlib.contextmanager
def stdio(_path: Path) -> Iterator[Pair]:
    """Through a process that copies its standard streams."""
    there, writable = os.pipe()
    readable, back = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", COPIER], stdin=there, stdout=back, stderr=subprocess.DEVNULL
    )
    os.close(there)
    os.close(back)
    try:
        with (
            connect(f"fd:{writable}") as sender,
            listen(f"fd:{readable}") as listener,
            accepted(listener.accept()) as receiver,
        ):
            yield sender, receiver
    finally:
        process.kill()
        process.wait()


DUPLEX = [tcp4, tcp6, unix, fd_socket, memory, limited_memory, unix_read_ahead]
ONE_WAY = [fd_pipe, pipe_read_ahead, exec_sender, exec_receiver, stdio]
