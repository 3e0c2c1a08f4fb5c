"""A guest that never stops writing is saved while it runs, and resumed; over each transport."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import pytest

import vmferry
from tests.interop.lab import PC, Lab, Vm, wait_until
from tests.support.capture import Scenario, finish_migration
from tests.transports.support import need_ipv6
from vmferry.qemu import Qmp

pytestmark = pytest.mark.qemu

DUPLEX = replace(PC, capabilities=("return-path",))
"""Over a transport with two directions the source asks whether its machine has arrived."""

# What a user would let QEMU run.
RECEIVE = "import sys, vmferry; vmferry.receive('-', sys.argv[1])"
SEND = "import sys, vmferry; vmferry.send(sys.argv[1], '-')"


class Transport(Protocol):
    """How QEMU and vmferry meet."""

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        """A source that has stopped, and the checkpoint of it."""

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        """A fresh QEMU that was sent the machine."""


@dataclass(frozen=True)
class Sockets:
    """QEMU connects to vmferry, and vmferry to QEMU; ``{}`` in the URI is a directory."""

    uri: str

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        source = lab.source()
        return source, lab.receive(source, DUPLEX, self.uri.format(lab.directory()))

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        vm = lab.destination()
        vm.qemu.incoming(self.uri.format(lab.directory()))
        [address] = vm.qemu.query_migrate()["socket-address"]
        port = self.uri.rpartition(":")[0] + ":" + address.get("port", "")
        return sent(vm, checkpoint, f"unix:{address['path']}" if "path" in address else port)


@dataclass(frozen=True)
class Descriptors:
    """Each side is given one end, the readable one first."""

    pair: Callable[[], tuple[int, int]]
    scenario: Scenario

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        monitor = lab.directory() / "monitor"
        source = lab.source(PC, "-qmp", f"unix:{monitor},server=on,wait=off")
        ours, theirs = self.pair()
        arrival = lab.arrival(f"fd:{ours}")
        source.qemu.prepare_migration(self.scenario.capabilities, held(self.scenario))
        migrate_to_descriptor(monitor, theirs)
        return source, lab.complete(source, self.scenario, arrival)

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        theirs, ours = self.pair()
        vm = lab.destination(pass_fds=[theirs])
        os.close(theirs)
        vm.qemu.incoming(f"fd:{theirs}")
        return sent(vm, checkpoint, f"fd:{ours}")


def migrate_to_descriptor(monitor: Path, descriptor: int) -> None:
    """Start a migration into *descriptor*; the name that a monitor gives it holds only there."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(monitor))
        with Qmp(connection.dup()) as session:
            command = b'{"execute": "getfd", "arguments": {"fdname": "ferry"}}\n'
            socket.send_fds(connection, [command], [descriptor])
            os.close(descriptor)
            session.execute("migrate", {"uri": "fd:ferry"})


def socket_pair() -> tuple[int, int]:
    one, two = socket.socketpair()
    return one.detach(), two.detach()


class Commands:
    """A command at either side, and a named pipe between them."""

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        fifo = new_fifo(lab)
        source = lab.source()
        arrival = lab.arrival(f"exec:cat {fifo}")
        lab.depart(source, PC, f"exec:cat >{fifo}")
        return source, lab.complete(source, PC, arrival)

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        fifo = new_fifo(lab)
        vm = lab.destination()
        vm.qemu.incoming(f"exec:cat {fifo}")
        return sent(vm, checkpoint, f"exec:cat >{fifo}")


def new_fifo(lab: Lab) -> Path:
    fifo = lab.directory() / "fifo"
    os.mkfifo(fifo)
    return fifo


@dataclass(frozen=True)
class Files:
    """A file between them, from an offset on as management tools save, who put a header first."""

    offset: int

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        stream, part = (lab.directory() / name for name in ("stream", "part"))
        part.write_bytes(b"#" * self.offset)
        source = lab.source()
        lab.depart(source, PC, f"exec:cat >>{part} && mv {part} {stream}")
        finish_migration(source.qemu, PC)
        wait_until(stream.exists)  # QEMU does not wait for the command
        return source, lab.saved(lab.arrival(self.uri(stream)).result(), PC)

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        stream = lab.directory() / "stream"
        vm = lab.destination()
        vmferry.send(checkpoint, self.uri(stream))
        vm.qemu.incoming(f"exec:tail -c +{self.offset + 1} {stream}")
        vm.qemu.wait_migration()
        return vm

    def uri(self, stream: Path) -> str:
        return f"file:{stream}" + (f",offset={self.offset}" if self.offset else "")


class StandardStreams:
    """QEMU runs vmferry, which finds the stream at its standard input or output."""

    def save(self, lab: Lab) -> tuple[Vm, vmferry.Checkpoint]:
        directory = lab.directory() / "checkpoint"
        source = lab.source()
        lab.depart(source, PC, f"exec:{python(RECEIVE, directory)}")
        finish_migration(source.qemu, PC)
        wait_until((directory / "manifest.json").exists)
        return source, lab.saved(vmferry.Checkpoint(directory), PC)

    def resume(self, lab: Lab, checkpoint: vmferry.Checkpoint) -> Vm:
        vm = lab.destination()
        vm.qemu.incoming(f"exec:{python(SEND, checkpoint.path)}")
        vm.qemu.wait_migration()
        return vm


def python(program: str, argument: Path) -> str:
    return shlex.join([sys.executable, "-c", program, str(argument)])


def held(scenario: Scenario) -> dict[str, object]:
    """Parameters that keep a source from finishing."""
    return {"downtime-limit": 1, "max-bandwidth": scenario.bandwidth}


def sent(vm: Vm, checkpoint: vmferry.Checkpoint, uri: str) -> Vm:
    """*vm*, with the machine that *uri* brings to it."""
    vmferry.send(checkpoint, uri)
    vm.qemu.wait_migration()
    return vm


TRANSPORTS = [
    pytest.param(Sockets("tcp:127.0.0.1:0"), id="tcp4"),
    pytest.param(Sockets("tcp:[::1]:0"), id="tcp6"),
    pytest.param(Sockets("unix:{}/a,b"), id="unix"),
    pytest.param(Descriptors(socket_pair, DUPLEX), id="fd-socket"),
    pytest.param(Descriptors(os.pipe, PC), id="fd-pipe"),
    pytest.param(Commands(), id="exec"),
    pytest.param(Files(0), id="file"),
    pytest.param(Files(4096), id="file-offset"),
    pytest.param(StandardStreams(), id="standard-streams"),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_guest_goes_on_after_travelling_over(lab: Lab, transport: Transport) -> None:
    """Saved over a transport and resumed over it, the guest misses no page and counts on."""
    if transport == Sockets("tcp:[::1]:0"):
        need_ipv6()
    source, checkpoint = transport.save(lab)
    assert source.status() == "completed"
    assert source.run_state == "postmigrate"
    asked = "return-path" in source_capabilities(source)
    assert ("return-path" in checkpoint.manifest.capabilities) == asked
    lab.assert_goes_on(transport.resume(lab, checkpoint), source)


def source_capabilities(vm: Vm) -> set[str]:
    states = vm.qemu.execute("query-migrate-capabilities")
    return {state["capability"] for state in states if state["state"]}
