"""Multifd channels of a move under way that stall or are reset: the machine runs on, soon."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest

from tests.migration.between import Between
from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry.migration.control import Control
from vmferry.migration.status import Status

LONG = 20.0
CHANNELS = 3
PAGES = 8_000
BUSY = 500
"""Pages that a machine writes again and again that is never at its end."""
RATE = 4 << 20
RESET = struct.pack("ii", 1, 0)
"""``SO_LINGER``: a close resets the connection."""


class Channels(Between):
    """Takes the connections of a source; a subclass says what becomes of what comes on each."""

    def __init__(self, stack: ExitStack) -> None:
        super().__init__(stack)
        listener = self._kept(socket.socket())
        # So little that a channel of which nobody reads is soon full.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        self.address = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        self._spawn(lambda: self._accept(listener))

    def connected(self, number: int, sock: socket.socket) -> None:
        """The connection of this number, 0 for the main channel, is there."""
        raise NotImplementedError

    def _accept(self, listener: socket.socket) -> None:
        for number in range(CHANNELS + 1):
            self.connected(number, self._kept(listener.accept()[0]))


class Stalling(Channels):
    """A destination that says nothing, and reads every channel but the last one."""

    def connected(self, number: int, sock: socket.socket) -> None:
        if number < CHANNELS:
            self._spawn(lambda: self._read(sock))

    def _read(self, sock: socket.socket) -> None:
        while sock.recv(1 << 16):
            pass


class Resetting(Channels):
    """Forwards to *target*, and resets the second multifd channel at one of its ends.

    As soon as *after* bytes have come on it, or when :meth:`reset` is called.
    """

    def __init__(self, stack: ExitStack, target: str, end: str, after: int | None = None) -> None:
        self._target = ("127.0.0.1", int(target.rpartition(":")[2]))
        self._end = end
        self._after = after
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        super().__init__(stack)

    def connected(self, number: int, sock: socket.socket) -> None:
        other = self._kept(socket.create_connection(self._target))
        self._pairs.append((sock, other))
        self._spawn(partial(self._pump, number, sock, other))
        self._spawn(partial(self._pump, -1, other, sock))

    def reset(self) -> None:
        """Reset the connection now, and end it on the other side."""
        victim, other = self._pairs[2] if self._end == "source" else self._pairs[2][::-1]
        victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        # A descriptor is closed when no call uses it any more.
        victim.shutdown(socket.SHUT_RD)
        victim.close()
        with contextlib.suppress(OSError):  # whoever forwards may have ended it already
            other.shutdown(socket.SHUT_RDWR)

    def _pump(self, number: int, source: socket.socket, sink: socket.socket) -> None:
        count = 0
        try:
            while number != 2 or self._after is None or count < self._after:
                if not (data := source.recv(1 << 14)):
                    return sink.shutdown(socket.SHUT_WR)
                count += len(data)
                sink.sendall(data)
        except OSError:  # as if nothing were between them
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            return None
        return self.reset()


def side(stack: ExitStack, machine: PythonMachine) -> Control:
    control = Control(stack.enter_context(machine))
    stack.callback(control.close)
    control.set_parameters({"multifd-channels": CHANNELS, "max-bandwidth": 0})
    control.set_capabilities({"multifd": True})
    return control


def running(stack: ExitStack, hot: int = 8) -> tuple[Control, PythonMachine]:
    machine = PythonMachine(PAGES, hot)
    machine.ram.array[hot * 4096 :] = np.random.default_rng(1).integers(
        0, 256, (PAGES - hot) * 4096, np.uint8
    )
    source = side(stack, machine)
    machine.resume()
    return source, machine


def goes_on(machine: PythonMachine) -> None:
    assert machine.running
    before = machine.steps
    wait_until(lambda: machine.steps > before)


def sent(source: Control) -> tuple[float, int]:
    return time.monotonic(), source.query()["ram"]["transferred"]


def stalled(stack: ExitStack, source: Control) -> None:
    """Begin, with a destination of which one channel reads nothing; return when that counts."""
    source.set_parameters({"downtime-limit": 0})
    source.migrate(Stalling(stack).address)
    wait_until(lambda: source.query().get("ram", {}).get("transferred", 0) > 1 << 20, LONG)


def test_limit_holds_while_one_channel_stalls(stack: ExitStack) -> None:
    source, machine = running(stack, BUSY)
    source.set_parameters({"max-bandwidth": RATE})
    stalled(stack, source)
    since, before = sent(source)
    while time.monotonic() < since + 3:
        time.sleep(0.2)
        at, now = sent(source)
        assert now - before <= RATE * (at - since) * 1.05 + RATE / 10
    source.cancel()
    assert source.wait(LONG) == Status.CANCELLED
    goes_on(machine)


@pytest.mark.parametrize("rate", [0, RATE])
def test_channel_that_stalls_has_a_deadline(stack: ExitStack, rate: int) -> None:
    source, machine = running(stack, BUSY)
    source.set_parameters({"max-bandwidth": rate, "x-vmferry-idle-deadline": 1})
    stalled(stack, source)
    assert source.wait(LONG) == Status.FAILED
    reason = source.query()["error-desc"]
    assert "multifd" in reason
    assert "waited 1 s for the other side to read on" in reason
    goes_on(machine)


@pytest.mark.parametrize("rate", [0, RATE])
def test_cancel_is_answered_while_a_channel_stalls(stack: ExitStack, rate: int) -> None:
    source, machine = running(stack, BUSY)
    source.set_parameters({"max-bandwidth": rate})
    stalled(stack, source)
    wait_until(lambda: not rate or source.query()["ram"]["transferred"] > 5 << 20, LONG)
    source.cancel()
    assert machine.running
    assert source.wait(1) == Status.CANCELLED
    goes_on(machine)


class Late(Resetting):
    """Connects a multifd channel only when all of the main channel may have come."""

    def connected(self, number: int, sock: socket.socket) -> None:
        if number:
            time.sleep(0.3)
        super().connected(number, sock)


def test_nothing_that_a_channel_brings_late_is_missed(stack: ExitStack) -> None:
    machine, there = PythonMachine(300).fill(), PythonMachine(300)
    source, destination = side(stack, machine), side(stack, there)
    machine.resume()
    source.migrate(Late(stack, destination.incoming("tcp:127.0.0.1:0"), "source").address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    goes_on(there)
    there.pause()
    there.check()


def test_channel_that_never_comes_has_a_deadline(stack: ExitStack) -> None:
    source, machine = running(stack)
    destination = side(stack, PythonMachine(PAGES))
    destination.set_parameters({"x-vmferry-hello-deadline": 0.5})
    source.migrate(Never(stack, destination.incoming("tcp:127.0.0.1:0"), "source").address)
    assert source.wait(LONG) == Status.FAILED
    assert "waited 500 ms for 3 multifd channels, 2 came" in source.query()["error-desc"]
    assert destination.wait(LONG) == Status.FAILED
    goes_on(machine)


class Never(Resetting):
    """Takes the last channel, and brings it nowhere."""

    def connected(self, number: int, sock: socket.socket) -> None:
        if number < CHANNELS:
            super().connected(number, sock)


def test_channel_that_comes_late_is_waited_for(stack: ExitStack) -> None:
    """More is sent than there is room for on the way to a channel that nobody reads."""
    source, _ = running(stack)
    destination = side(stack, there := PythonMachine(PAGES))
    source.migrate(Late(stack, destination.incoming("tcp:127.0.0.1:0"), "source").address)
    assert source.wait(LONG) == Status.COMPLETED, source.query()
    assert destination.wait(LONG) == Status.COMPLETED
    goes_on(there)


MOMENTS = [0, 64, 100_000, 3_000_000]
"""Bytes of a channel behind which it is reset: before its hello, behind that, and later."""


@pytest.mark.parametrize("after", MOMENTS)
@pytest.mark.parametrize("end", ["source", "destination"])
def test_channel_that_is_reset_leaves_the_machine_here(
    stack: ExitStack, end: str, after: int
) -> None:
    source, machine = running(stack)
    destination = side(stack, there := PythonMachine(PAGES))
    between = Resetting(stack, destination.incoming("tcp:127.0.0.1:0"), end, after)
    source.migrate(between.address)
    assert source.wait(LONG) == Status.FAILED, source.query()
    assert destination.wait(LONG) == Status.FAILED
    assert not there.running
    goes_on(machine)


@pytest.mark.parametrize("end", ["source", "destination"])
def test_channel_that_is_reset_before_the_switchover_leaves_the_machine_here(
    stack: ExitStack, end: str
) -> None:
    source, machine = running(stack)
    destination = side(stack, there := PythonMachine(PAGES))
    between = Resetting(stack, destination.incoming("tcp:127.0.0.1:0"), end)
    source.set_capabilities({"pause-before-switchover": True})
    source.migrate(between.address)
    wait_until(lambda: source.status not in {Status.SETUP, Status.ACTIVE}, LONG)
    assert source.status == Status.PRE_SWITCHOVER, source.query()
    between.reset()
    if end == "source":  # which hears of it when it sends
        source.proceed("pre-switchover")
    assert source.wait(LONG) == Status.FAILED, source.query()
    assert destination.wait(LONG) == Status.FAILED
    assert not there.running
    goes_on(machine)
