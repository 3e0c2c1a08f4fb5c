"""A destination refuses while its source still sends: the source hears why at once, even from
behind a proxy."""

from __future__ import annotations

import contextlib
import socket
from contextlib import ExitStack
from functools import partial
from uuid import UUID

import pytest

from tests.migration.between import Between
from tests.migration.python_machine import PythonMachine
from tests.transports.support import wait_until
from vmferry.migration.control import Control
from vmferry.migration.status import Status

SOON = 8.0
"""Seconds for what takes milliseconds; to send everything takes a minute."""

LARGE = 20_000
"""Pages of the machine, of which 1 MiB a second is sent."""


class Proxy(Between):
    """Forwards connections as proxies do: each direction, and its end, for itself.

    *stubborn* is what one does with what comes for a side that no longer reads: with ``drain`` it
    reads on and forgets that, with ``stop`` it reads no more; either way it breaks off nothing.
    """

    def __init__(self, stack: ExitStack, target: tuple[str, int], stubborn: str) -> None:
        super().__init__(stack)
        self._target = target
        self._stubborn = stubborn
        self._listener = self._kept(socket.create_server(("127.0.0.1", 0)))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._spawn(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one = self._kept(self._listener.accept()[0])
                two = self._kept(socket.create_connection(self._target))
                self._spawn(partial(self._pump, one, two))
                self._spawn(partial(self._pump, two, one))

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        listens = True
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if listens:
                    try:
                        sink.sendall(data)
                    except OSError:
                        listens = False
                elif self._stubborn == "stop":
                    return
            sink.shutdown(socket.SHUT_WR)


def side(stack: ExitStack, machine: PythonMachine) -> Control:
    control = Control(stack.enter_context(machine))
    stack.callback(control.close)
    return control


OTHERS = {
    "other machine": ({"name": "python-2.0"}, 'a machine \\"python-2.0\\"'),
    "other memory": ({"pages": LARGE + 1}, "expected "),
    "other UUID": ({"uuid": UUID(int=2)}, "UUID"),
}


@pytest.mark.parametrize("between", ["nothing", "drain", "stop"])
@pytest.mark.parametrize("capability", ["events", "multifd"])
@pytest.mark.parametrize("other", OTHERS)
def test_refusal_is_heard_at_once(
    stack: ExitStack, between: str, capability: str, other: str
) -> None:
    options, reason = OTHERS[other]
    here = PythonMachine(LARGE, uuid=UUID(int=1)).fill()
    there = PythonMachine(**{"pages": LARGE, "uuid": UUID(int=1)} | options)  # type: ignore[arg-type]
    source, destination = side(stack, here), side(stack, there)
    here.resume()
    source.set_parameters({"max-bandwidth": 1 << 20})
    source.set_capabilities({capability: True, "validate-uuid": True})
    address = destination.incoming("tcp:127.0.0.1:0")
    if between != "nothing":
        port = int(address.rpartition(":")[2])
        address = Proxy(stack, ("127.0.0.1", port), between).address
    source.migrate(address)
    assert source.wait(SOON) == Status.FAILED
    said = source.query()["error-desc"]
    assert said.startswith("the destination refused the machine: ")
    assert reason in said
    assert destination.wait(SOON) == Status.FAILED
    assert not there.running
    before = here.steps
    wait_until(lambda: here.steps > before)
