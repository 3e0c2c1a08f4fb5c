"""What goes wrong in the middle: one clear error, nothing half made, and a source that runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vmferry
from tests.interop.lab import PATIENCE, PC, Arrival, Lab, Vm, wait_until
from tests.support.capture import Scenario

pytestmark = pytest.mark.qemu

SLOW = replace(PC, bandwidth=1 << 20)
"""A pass over memory takes seconds: things go wrong in the middle of it."""

PART = 256 << 10
"""Bytes behind which a migration is in the middle."""

# A receiver in a process of its own, which tells how it ended.
RECEIVER = """
import json, pathlib, sys, vmferry
try:
    vmferry.receive(sys.argv[1], sys.argv[2])
except vmferry.VmferryError as error:
    print(json.dumps(error.to_json() | {"left": pathlib.Path(sys.argv[2]).exists()}))
"""

WAYS = [
    pytest.param((), id="plain"),
    pytest.param(("return-path",), id="return-path"),
    pytest.param(("multifd", "return-path"), id="multifd"),
]


def half_way(lab: Lab, scenario: Scenario, arrival: Arrival) -> Vm:
    """A source of which a part has arrived."""
    source = lab.source(scenario)
    lab.depart(source, scenario, arrival.address)
    wait_until(lambda: arrival.progress.phase == "active" and arrival.progress.transferred > PART)
    return source


def assert_runs_on(source: Vm, *status: str) -> None:
    """The source's migration ended with a *status*, by default ``failed``; its guest counts on."""
    wait_until(lambda: source.status() in (status or {"failed"}))
    source.qemu.wait_running()
    source.serial.wait_beat(after=source.serial.drain())


def assert_nothing_left(arrival: Arrival) -> None:
    assert not arrival.directory.exists()


@pytest.mark.parametrize("capabilities", WAYS)
def test_source_that_is_cancelled_leaves_nothing_behind(
    lab: Lab, capabilities: tuple[str, ...]
) -> None:
    """``migrate_cancel`` shows as a stream that was cut off; the same machine can be saved then."""
    scenario = replace(SLOW, capabilities=capabilities)
    arrival = lab.arrival()
    source = half_way(lab, scenario, arrival)
    source.qemu.execute("migrate_cancel")
    # Cut off in the middle of something or, with an answer on its way to QEMU, broken off.
    with pytest.raises((vmferry.TruncatedStream, vmferry.TransportError), match="off"):
        arrival.result()
    assert_nothing_left(arrival)
    # With a return path QEMU closes the connection before it notes that it is being cancelled: then
    # it may take what the other side does in answer for a failure.
    assert_runs_on(source, "cancelled", *(["failed"] if capabilities else []))
    fast = replace(PC, capabilities=capabilities)
    resumed = lab.resume(lab.receive(source, fast), fast)
    lab.assert_goes_on(resumed, source)


@pytest.mark.parametrize("capabilities", WAYS)
def test_receiver_that_is_cancelled_leaves_the_machine_to_its_source(
    lab: Lab, capabilities: tuple[str, ...]
) -> None:
    """``cancel()`` from another thread is a failed migration for the source, which runs on."""
    scenario = replace(SLOW, capabilities=capabilities)
    arrival = lab.arrival()
    source = half_way(lab, scenario, arrival)
    arrival.destination.cancel()
    with pytest.raises(vmferry.ChannelClosed, match="cancelled on this side"):
        arrival.result()
    assert_nothing_left(arrival)
    assert_runs_on(source)


@pytest.mark.parametrize("capabilities", WAYS)
def test_guest_larger_than_allowed_is_refused(lab: Lab, capabilities: tuple[str, ...]) -> None:
    """``max_ram`` is held against the list of blocks, before any memory is taken for them."""
    scenario = replace(PC, capabilities=capabilities)
    source = lab.source(scenario)
    arrival = lab.arrival(max_ram=16 << 20)
    lab.depart(source, scenario, arrival.address)
    with pytest.raises(vmferry.LimitExceeded, match=r"at most 16777216 bytes .* --max-ram"):
        arrival.result()
    assert_nothing_left(arrival)
    assert_runs_on(source)


def test_return_path_is_refused_where_there_is_no_way_back(lab: Lab) -> None:
    """A source that wants an answer over ``exec:`` is told at once, not left to wait for it."""
    scenario = replace(PC, capabilities=("return-path",))
    fifo = lab.directory() / "fifo"
    os.mkfifo(fifo)
    source = lab.source(scenario)
    arrival = lab.arrival(f"exec:cat {fifo}")
    lab.depart(source, scenario, f"exec:cat >{fifo}")
    with pytest.raises(vmferry.PeerError, match="use tcp: or unix:, or turn return-path off"):
        arrival.result()
    assert_nothing_left(arrival)
    assert_runs_on(source)


@pytest.mark.parametrize("capabilities", [("postcopy-ram",), ("postcopy-ram", "postcopy-preempt")])
def test_switch_to_postcopy_is_refused(lab: Lab, capabilities: tuple[str, ...]) -> None:
    """A source that switches over stops its machine first, and QEMU 7.2 may not get it back.

    It is ``failed`` where it learns of the refusal before it has written the device state, and
    ``cont`` lets the machine run; behind that point, a matter of microseconds, it is
    ``postcopy-paused`` for ever: neither ``cont`` nor ``migrate_cancel`` helps.
    """
    scenario = replace(SLOW, capabilities=capabilities)
    arrival = lab.arrival()
    source = half_way(lab, scenario, arrival)
    source.qemu.execute("migrate-start-postcopy")
    with pytest.raises(
        vmferry.PeerError, match=r"switched to postcopy, .* let it finish in precopy"
    ):
        arrival.result()
    assert_nothing_left(arrival)
    wait_until(lambda: source.status() in {"failed", "postcopy-paused"})
    if source.status() == "failed":
        wait_until(lambda: source.run_state == "postmigrate")
        source.qemu.execute("cont")
        assert_runs_on(source)
    else:
        assert source.run_state == "finish-migrate"


def receiver(uri: str, directory: Path) -> list[str]:
    return [sys.executable, "-c", RECEIVER, uri, str(directory)]


@contextmanager
def process(command: list[str], socket: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A receiver that listens."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as started:
        try:
            wait_until(lambda: socket.exists() or started.poll() is not None)
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("capabilities", WAYS)
def test_receiver_that_is_killed_leaves_an_incomplete_directory(
    lab: Lab, capabilities: tuple[str, ...]
) -> None:
    """Nobody cleans up after a kill -9, but nobody takes the rest for a checkpoint either."""
    scenario = replace(SLOW, capabilities=capabilities)
    place = lab.directory()
    with process(receiver(f"unix:{place}/socket", place / "half"), place / "socket") as killed:
        source = lab.source(scenario)
        lab.depart(source, scenario, f"unix:{place}/socket")
        wait_until(lambda: source.qemu.query_migrate().get("ram", {}).get("transferred", 0) > PART)
        killed.kill()
        killed.wait(PATIENCE)
    with pytest.raises(vmferry.CheckpointIncomplete, match="did not finish"):
        vmferry.Checkpoint(place / "half")
    assert_runs_on(source)


def on_a_small_disk(command: list[str], directory: Path, size: str) -> list[str]:
    """*command*, which alone sees a file system of *size* at *directory*."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if subprocess.run([*unshare, *mount], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount anything, not even for one process")
    return [*unshare, "sh", "-c", f"{shlex.join(mount)} && exec {shlex.join(command)}"]


@pytest.mark.parametrize("capabilities", WAYS)
def test_full_disk_leaves_the_machine_to_its_source(
    lab: Lab, capabilities: tuple[str, ...]
) -> None:
    """The receiver says that the disk is full and cleans it up; the source runs on."""
    scenario = replace(PC, capabilities=capabilities)
    place = lab.directory()
    command = receiver(f"unix:{place}/socket", place / "disk" / "half")
    command = on_a_small_disk(command, place / "disk", "1m")
    with process(command, place / "socket") as started:
        source = lab.source(scenario)
        lab.depart(source, scenario, f"unix:{place}/socket")
        output, _ = started.communicate(timeout=PATIENCE)
    error: dict[str, Any] = json.loads(output)
    assert error["kind"] == "StorageError"
    assert "No space left" in error["message"]
    assert not error["left"]
    assert_runs_on(source)


def test_directory_that_is_in_use_is_refused_before_the_source_connects(lab: Lab) -> None:
    """A checkpoint is never written over."""
    source = lab.source()
    checkpoint = lab.receive(source)
    with pytest.raises(vmferry.StorageError, match="exists already"):
        vmferry.receive(f"unix:{lab.path}/socket", checkpoint.path)
    checkpoint.verify()


OTHER_MACHINES = [
    pytest.param(replace(PC, machine=("-machine", "q35", "-nodefaults")), id="machine"),
    pytest.param(replace(PC, memory=32), id="memory"),
    pytest.param(PC, id="devices"),
]


@pytest.mark.parametrize("other", OTHER_MACHINES)
def test_machine_that_does_not_fit_is_an_error_for_the_sender(lab: Lab, other: Scenario) -> None:
    """A QEMU that was started otherwise refuses what it is sent, and the next one may take it."""
    scenario = replace(PC, machine=(*PC.machine, "-device", "e1000"))
    source = lab.source(scenario)
    checkpoint = lab.receive(source, scenario)
    refused = (vmferry.PeerError, vmferry.TransportError)
    with pytest.raises(refused, match=r"own messages (may )?say why"):
        lab.resume(checkpoint, other)
    lab.assert_goes_on(lab.resume(checkpoint, scenario), source)


CHANNELS_THAT_DO_NOT_FIT = [
    pytest.param(2, (), {}, "own messages may say why", id="unexpected"),
    pytest.param(4, ("multifd",), {"multifd-channels": 2}, "own messages", id="too-many"),
    pytest.param(2, ("multifd",), {"multifd-channels": 4}, "waited 500 ms", id="too-few"),
    pytest.param(0, ("multifd",), {}, "waited 500 ms .* to read on, it did not", id="none"),
]


@pytest.mark.parametrize(
    ("channels", "capabilities", "parameters", "reason"), CHANNELS_THAT_DO_NOT_FIT
)
def test_sender_does_not_wait_for_ever_for_a_qemu_that_expects_other_channels(
    lab: Lab, channels: int, capabilities: list[str], parameters: dict[str, object], reason: str
) -> None:
    """QEMU 7.2 ends where there are too many channels, and reads nothing where one is missing."""
    source = lab.source()
    checkpoint = lab.receive(source)
    options = vmferry.SendOptions(multifd=channels, idle=0.5, answer=0.5)
    with pytest.raises(vmferry.TransportError, match=reason):
        lab.resume(checkpoint, PC, options, capabilities=capabilities, parameters=parameters)
