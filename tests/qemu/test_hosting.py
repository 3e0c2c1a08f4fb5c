"""Machines hosted in a process: from their start until they are over, for each reason there is."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from tests.migration.relay import Relay
from tests.qemu.hosts import HELD, PATIENCE, SMALL, Hosts, assert_intact
from tests.transports.support import background, wait_until
from vmferry.errors import MachineError, PeerError, TransportError, UsageError, VmferryError
from vmferry.machines import GuestConfig
from vmferry.machines.guest.layout import Layout
from vmferry.migration.takeover import GO
from vmferry.qemu import Migration
from vmferry.qemu.hosting import Host
from vmferry.qemu.writer import KEPT, BackgroundWriter
from vmferry.wire.commands import Ping


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        yield Hosts(stack, tmp_path)


def test_without_a_monitor_it_runs_too() -> None:
    said: list[bytes] = []
    with Host(SMALL, serial=said.append) as host:
        host.console.wait_filled(PATIENCE)
        assert host.state == "running"
    assert b"".join(said).startswith(b"F ")


def test_states_are_told_from_start_to_end(hosts: Hosts) -> None:
    source, here = hosts.start()
    destination, there = hosts.start(incoming=hosts.uri())
    states: tuple[list[str], list[str]] = ([], [])
    waits = [background(lambda: source.wait(states[0].append))]
    waits.append(background(lambda: destination.wait(states[1].append)))
    wait_until(lambda: states == (["running"], ["inmigrate"]))
    migration = Migration(here)
    migration.begin(str(destination.address), parameters={"downtime-limit": "1s"})
    migration.wait()
    wait_until(lambda: (states[0][-1], states[1][-1]) == ("postmigrate", "running"))
    source.cancel()
    there.execute("quit")
    assert [wait.result(PATIENCE) for wait in waits] == ["host-signal", "host-qmp-quit"]
    assert here.wait_event("SHUTDOWN", timeout=PATIENCE)["data"] == {
        "guest": False,
        "reason": "host-signal",
    }
    assert_intact(destination)


def test_doubt_is_told_and_an_operator_decides(hosts: Hosts) -> None:
    source, here = hosts.start()
    destination, there = hosts.start(incoming=hosts.uri())
    states: tuple[list[str], list[str]] = ([], [])
    background(lambda: source.wait(states[0].append))
    background(lambda: destination.wait(states[1].append))
    with Relay(hosts.uri(), str(destination.address), trigger=Ping(GO).encode()) as relay:
        migration = Migration(here)
        migration.begin(relay.address, parameters={"downtime-limit": "1s"})
        with pytest.raises(PeerError, match=r"failed: .*; the source is postmigrate"):
            migration.wait()
    wait_until(lambda: states[0][-1] == states[1][-1] == "in-doubt")
    there.execute("cont")
    wait_until(lambda: states[1][-1] == "running")
    assert_intact(destination)
    source.cancel()
    destination.cancel()


def test_machine_that_came_stays_when_its_next_migration_fails(hosts: Hosts) -> None:
    _source, here = hosts.start()
    destination, there = hosts.start(incoming=hosts.uri())
    waiting = background(destination.wait)
    first = Migration(here)
    first.begin(str(destination.address), parameters={"downtime-limit": "1s"})
    first.wait()
    second = Migration(there)
    second.begin(hosts.uri())  # where nobody listens
    with pytest.raises(PeerError, match="failed"):
        second.wait()
    for _ in range(20):  # for longer than it takes to look at the machine
        destination.console.wait_beat(PATIENCE)
    there.execute("quit")
    assert waiting.result(PATIENCE) == "host-qmp-quit"


def test_machine_that_does_not_come_is_an_error(hosts: Hosts) -> None:
    destination, there = hosts.start(incoming=hosts.uri())
    waiting = background(destination.wait)
    other, here = hosts.start(replace(SMALL, ram=4 << 20))
    migration = Migration(here)
    migration.begin(str(destination.address))
    with pytest.raises(PeerError, match=r"4194304.*; the source is running"):
        migration.wait()
    with pytest.raises(VmferryError, match=r"4194304|4 MiB"):
        waiting.result(PATIENCE)
    assert there.wait_event("SHUTDOWN", timeout=PATIENCE)["data"]["reason"] == "host-error"
    other.console.wait_beat(PATIENCE)


def test_guest_that_finds_an_error_ends_it(hosts: Hosts) -> None:
    host, session = hosts.start()
    host.console.wait_filled(PATIENCE)
    session.execute("stop")
    page = Layout.of(SMALL).base
    host.machine.memory["ram"].array[page : page + 4096] ^= 0xFF
    session.execute("cont")
    with pytest.raises(MachineError, match="the guest found an error: vCPU 0: page 0 is"):
        host.wait()
    assert session.wait_event("SHUTDOWN", timeout=PATIENCE)["data"]["reason"] == "host-error"


def test_where_to_wait_is_said_later(hosts: Hosts) -> None:
    source, here = hosts.start()
    destination, there = hosts.start(incoming="defer")
    assert destination.address is None
    uri = hosts.uri()
    there.execute("migrate-incoming", {"uri": uri})
    migration = Migration(here)
    migration.begin(uri, parameters={"downtime-limit": "1s"})
    migration.wait()
    assert_intact(destination)
    assert not source.machine.running


def test_to_be_told_later_takes_a_monitor() -> None:
    with pytest.raises(UsageError, match="a monitor is needed"), Host(SMALL, incoming="defer"):
        pass


@pytest.mark.parametrize("failing", ["monitor", "incoming"])
def test_what_cannot_start_leaves_nothing_behind(failing: str, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    options = {failing: f"{'unix:' if failing == 'incoming' else ''}{tmp_path}/no/socket"}
    with pytest.raises(TransportError, match="No such file"), Host(SMALL, **options):  # type: ignore[arg-type]
        pass
    wait_until(lambda: set(threading.enumerate()) <= threads)


def test_leaving_in_the_middle_of_a_migration_ends_it(hosts: Hosts, tmp_path: Path) -> None:
    destination, _ = hosts.start(incoming=hosts.uri())
    with Host(SMALL, monitor=tmp_path / "q") as source:
        source.console.wait_filled(PATIENCE)
        source.control.set_parameters(HELD)
        source.control.migrate(str(destination.address))
        wait_until(lambda: "ram" in source.control.query())
    with pytest.raises(VmferryError):
        destination.wait()


def test_uuid_is_told(hosts: Hosts) -> None:
    uuid = UUID("1b4e28ba-2fa1-11d2-883f-0016d3cca427")
    _, session = hosts.start(replace(SMALL, uuid=uuid))
    assert session.execute("query-uuid") == {"UUID": str(uuid)}


# The serial port


def test_slow_reader_of_the_serial_port_does_not_stop_the_machine(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with (
        os.fdopen(writer, "wb", 0) as file,
        BackgroundWriter(file) as output,
        Host(replace(SMALL, guest=GuestConfig(heartbeat=0.001)), serial=output.feed) as host,
    ):
        output.feed(bytes(KEPT))  # more than the pipe holds
        host.console.wait_beat(PATIENCE)
        host.console.wait_beat(PATIENCE)
        assert host.machine.running
    os.close(reader)


def test_all_that_was_said_is_written_before_the_end(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb", 0) as file, BackgroundWriter(file) as writer:
        for number in range(1000):
            writer.feed(f"{number}\n".encode())
    assert (tmp_path / "out").read_bytes() == b"".join(b"%d\n" % n for n in range(1000))
    writer.feed(b"late")
    assert writer.lost == 4


def test_reader_that_goes_away_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", 0) as file, BackgroundWriter(file) as output:
        output.feed(b"x")
        output.feed(b"y")


def test_what_nobody_reads_is_lost_at_last() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb", 0) as file:
        with BackgroundWriter(file) as output:
            deadline = time.monotonic() + PATIENCE
            while not output.lost:
                assert time.monotonic() < deadline
                output.feed(bytes(1 << 18))
        os.close(reader)  # before the descriptor, which the thread may still write to


def test_memory_of_a_stopped_machine_is_checked(hosts: Hosts) -> None:
    host, qmp = hosts.start()
    host.console.wait_filled(PATIENCE)
    with pytest.raises(PeerError, match="the machine runs"):
        qmp.execute("x-vmferry-check")
    qmp.execute("stop")
    assert qmp.execute("x-vmferry-check") == {"findings": []}
    start = Layout.of(SMALL).base
    host.machine.memory["ram"].array[start + 5 * 4096 + 800] ^= 1
    [finding] = qmp.execute("x-vmferry-check")["findings"]
    assert "page 5 is torn" in finding
